"""Attention over packed pairs: rejected tokens attend to their prompt and to themselves, never to chosen ones, and
pairs never see each other.

transformers calls `packed_attention` in every layer; a `PairLayout` tells it where the pairs stand.  How far back a
layer looks is part of the mask that transformers makes for it (PhiMoE, Qwen2-MoE and others say it nowhere else).  A
packed pass makes no such mask.  So one pass of the probe (packed_probe.py) has transformers make its masks by
`reach_mask`, and each layer notes its reach.
"""

import math
from functools import cache, partial
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from packing import send

BY_HAND = 512  # keys up to which attention in bf16 on a CPU is faster by hand than torch's (docs/results.md)
AMPERE = 8, 0  # the compute capability from which FlashAttention runs
FAR = 2**17  # tokens: a reach beyond is none
NO_REACH = 2**40  # in the place of a mask that no reach describes

# What attention functions are given and packed attention does: the window stands in the mask too, and that one counts.
HONOURED = {"scaling", "sliding_window", "dropout", "position_ids", "use_cache", "is_causal", "cache_position"}
HONOURED |= {"output_attentions", "output_hidden_states", "return_dict"}


class CannotPack(Exception):
    """This model's attention asks for something that packed attention does not do."""


# -- how far back a layer looks ------------------------------------------------------------------------------------


def sees(queries, keys, reach):
    """Whether a query sees a key, by their positions: never a later one.  reach: None for all before it, n for the
    last n tokens (a sliding window), -n for those of its own chunk of n tokens.
    """
    seen = keys <= queries
    if reach is None:
        return seen
    return seen & (keys > queries - reach if reach > 0 else keys // -reach == queries // -reach)


def reach_mask(mask_function, local_size=None, device="cpu", **_):
    """transformers mask function that returns, in the place of a mask, its reach as (1, 1, 1, 1) int64, 0 for None.

    mask_function(batch, head, query, key) says what is seen.  It is asked for whole rows around every border that a
    reach could have, however long a window is.  Raises CannotPack for a mask that no reach describes.
    """
    keys, first = torch.arange(FAR, device=device), torch.zeros((), dtype=torch.long, device=device)
    last = mask_function(first, first, keys[-1], keys)
    width = int(last.sum())  # of a window; of a chunk only where the last token ends one
    for reach in (None, *(sign * size for size in (local_size, width) if size for sign in (1, -1))):
        size = abs(reach or 8)
        rows = torch.tensor([0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, 3 * size, FAR // 3, FAR - 1])
        rows = rows.to(device)[:, None]
        if torch.equal(mask_function(first, first, rows, keys).expand(len(rows), -1), sees(rows, keys, reach)):
            return torch.tensor(reach or 0).view(1, 1, 1, 1)
    return torch.tensor(NO_REACH).view(1, 1, 1, 1)  # no error yet: models make masks that no layer asks for


# -- attention -----------------------------------------------------------------------------------------------------


class Spans(NamedTuple):
    """The attention of a packed row as sequences one behind the other, which FlashAttention takes in one call:

        queries    [p0 c0] [r0]    [p1 c1] [r1]    ...     the row itself
        keys       [p0 c0] [p0 r0] [p1 c1] [p1 r1] ...     one gather of the row

    The last query of a sequence stands at its last key, and sees no later one.
    """

    query_borders: torch.Tensor  # (2B + 1,) int32: where each sequence of queries begins, and the end
    key_borders: torch.Tensor  # (2B + 1,) int32
    key_places: torch.Tensor  # (K,) int32: where in the row each key is
    most_queries: int  # of a sequence
    most_keys: int

    @classmethod
    def of(cls, segments, device):
        queries, keys = [], []  # ranges of each sequence
        for segment in segments:
            prompt = range(segment.prompt_start, segment.chosen_start)
            prompt_and_chosen = range(segment.prompt_start, segment.rejected_start)
            rejected = range(segment.rejected_start, segment.end)
            queries += [prompt_and_chosen, rejected]
            keys += [[*prompt_and_chosen], [*prompt, *rejected]]
        query_borders = [0, *accumulate(map(len, queries))]
        key_borders = [0, *accumulate(map(len, keys))]
        key_places = [*chain.from_iterable(keys)]
        columns = query_borders, key_borders, key_places
        numbers = send(torch.tensor([*chain.from_iterable(columns)], dtype=torch.int32), device)
        return cls(*numbers.split([*map(len, columns)]), max(map(len, queries)), max(map(len, keys)))


class PairLayout:
    """Where the pairs of a packed row stand, and what its layers share: masks, spans.  Made anew for each pass."""

    def __init__(self, segments, ask_reach=False):
        self.segments = segments  # of PackedPairs
        self.masks = {}  # (queries, keys, reach) -> mask
        self.calls = 0
        self.ask_reach = ask_reach  # the layers are to note their reach, which they are given in the place of a mask
        self.longest = max((segment.end - segment.prompt_start for segment in segments), default=0)  # none is longer
        self.spans = cache(partial(Spans.of, segments))

    def mask(self, num_queries, num_keys, reach, like, copies=1):
        """(copies * queries, keys), 0 where seen, else -inf: the last query stands at the last key; of the type and on
        the device of `like`.
        """
        key = num_queries, num_keys, reach
        if key not in self.masks:
            keys = torch.arange(num_keys, device=like.device)
            queries = torch.arange(num_keys - num_queries, num_keys, device=like.device).view(-1, 1)
            unseen = sees(queries, keys, reach).logical_not()
            # Rows of 8 numbers: others CUDA's kernel copies into such ones, in every layer.
            width = 8 * math.ceil(num_keys / 8)
            mask = torch.zeros(num_queries, width, dtype=like.dtype, device=like.device).narrow(1, 0, num_keys)
            mask.masked_fill_(unseen, -math.inf)
            self.masks[key] = mask.repeat(copies, 1) if copies > 1 else mask
        return self.masks[key]


def packed_attention(module, query, key, value, attention_mask, pair_layout=None, **kwargs):
    """transformers attention function: query (1, heads, T, D), key and value (1, kv heads, T, D) -> (1, T, heads, D).

    Without `pair_layout` it is transformers' sdpa: for generation and the plain path.  There is no attention dropout:
    the log-probs of one pair must share one network.
    """
    if pair_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    pair_layout.calls += 1
    unknown = [name for name, given in kwargs.items() if given is not None and name not in HONOURED]
    if unknown:
        raise CannotPack(f"its attention takes {', '.join(unknown)}")
    if attention_mask is not None and attention_mask.numel() > 1:
        raise CannotPack("its layers make attention masks of their own")
    if pair_layout.ask_reach:
        module.pair_reach = None if attention_mask is None else attention_mask.item() or None
        if module.pair_reach == NO_REACH:
            raise CannotPack("its attention mask is neither causal nor a window nor in chunks")
    if torch.is_autocast_enabled(query.device.type):  # norms of fp32 weights leave fp32: cast once, not for each pair
        compute = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(compute), key.to(compute), value.to(compute)
    scaling, reach = kwargs.get("scaling"), module.pair_reach
    if reach is not None and abs(reach) >= pair_layout.longest:
        reach = None
    if runs_flash(query) and (reach is None or reach > 0):
        return attend_at_once(query, key, value, pair_layout.spans(query.device), scaling, reach), None
    return attend_by_pairs(query, key, value, pair_layout, scaling, reach), None


# -- one call for all pairs ----------------------------------------------------------------------------------------


def runs_flash(query):
    """Whether FlashAttention runs on this query (1, heads, T, D)."""
    return query.device.type == "cuda" and flash_takes(query, torch.cuda.get_device_capability(query.device))


def flash_takes(query, capability):
    """Whether it would on a GPU of this compute capability: in two bytes, with heads of up to 256 numbers."""
    is_narrow = query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return capability >= AMPERE and query.element_size() == 2 and is_narrow


def attend_at_once(query, key, value, spans, scaling, reach):
    """Attention of a packed row in one call whatever the number of pairs; shapes as of packed_attention."""
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    # In backward a prompt's keys add up two gradients: in any order the same to the bit.
    key, value = key.index_select(0, spans.key_places), value.index_select(0, spans.key_places)
    return flash(query, key, value, spans, scaling, reach).unsqueeze(0)


def flash(query, key, value, spans, scaling, reach):
    """FlashAttention-2 (arXiv:2307.08691) over sequences of different lengths: query (T, heads, D), key and value
    (K, kv heads, D) -> (T, heads, D).

    torch.nn.attention.varlen is this operator too, but takes grouped heads only since torch 2.12.
    """
    window = {} if reach is None else {"window_size_left": reach - 1, "window_size_right": 0}
    borders = spans.query_borders, spans.key_borders, spans.most_queries, spans.most_keys
    no_dropout, causal, no_debug_mask = 0.0, True, False
    flags = no_dropout, causal, no_debug_mask
    return torch.ops.aten._flash_attention_forward(query, key, value, *borders, *flags, scale=scaling, **window)[0]


# -- two calls for each pair ---------------------------------------------------------------------------------------


def attend_by_pairs(query, key, value, pair_layout, scaling, reach):
    """As attend_at_once, on any device, in any type."""
    groups = query.shape[1] // key.shape[1]

    def attend(q, k, v):  # (1, heads, tokens, D)
        whole = reach is None or k.shape[2] <= abs(reach)  # nothing is cut off
        if q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[2] <= BY_HAND:
            mask = pair_layout.mask(q.shape[2], k.shape[2], None if whole else reach, q, copies=groups)
            return attention_by_hand(q, k, v, mask, scaling)
        causal = whole and q.shape[2] == k.shape[2]
        if causal and (groups == 1 or takes_groups(q)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if causal:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        mask = pair_layout.mask(q.shape[2], k.shape[2], None if whole else reach, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)

    segments = pair_layout.segments
    chosen_starts = [segment.chosen_start for segment in segments]
    rejected_starts = [segment.rejected_start for segment in segments]
    prompt_and_chosen_q, rejected_q = cut_pairs(query, segments, rejected_starts)
    prompt_and_chosen_k, rejected_k = cut_pairs(key, segments, rejected_starts)
    prompt_and_chosen_v, rejected_v = cut_pairs(value, segments, rejected_starts)
    prompt_k, _ = cut_pairs(key, segments, chosen_starts)
    prompt_v, _ = cut_pairs(value, segments, chosen_starts)
    outputs = []
    for i in range(len(segments)):
        outputs.append(attend(prompt_and_chosen_q[i], prompt_and_chosen_k[i], prompt_and_chosen_v[i]))
        seen_k = torch.cat((prompt_k[i], rejected_k[i]), dim=2)
        seen_v = torch.cat((prompt_v[i], rejected_v[i]), dim=2)
        outputs.append(attend(rejected_q[i], seen_k, seen_v))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def cut_pairs(x, segments, borders):
    """The tokens of each pair in x (1, heads, T, D), cut in two at its border: all first parts, and all second parts.

    By split, whose backward is one cat; that of a slice is a tensor of zeros as large as the whole, for each slice.
    """
    sizes = []
    for segment, border in zip(segments, borders):
        sizes += [border - segment.prompt_start, segment.end - border]
    parts = x.split(sizes, dim=2)
    return parts[::2], parts[1::2]


def takes_groups(query):
    """Whether torch's attention takes grouped heads here.  On CUDA without flash it would make a matrix of scores for
    that, tokens x tokens for each head, and keep it for backward.
    """
    return query.device.type != "cuda"


def attention_by_hand(query, key, value, mask, scaling=None):
    """softmax(scaling * query key^T + mask) value, as in packed_attention; mask (heads / kv heads * queries, keys).

    The query heads that share a key head are rows of one product.  On a CPU in bf16 this takes half to a third of the
    time of torch's attention, which is slow in backward, and holds the probabilities, heads x queries x keys.
    """
    shape, (kv_heads, _, head_dim) = query.shape, key[0].shape
    scaling = head_dim**-0.5 if scaling is None else scaling
    rows = query.reshape(kv_heads, -1, head_dim)  # (kv heads, heads / kv heads * queries, D)
    scores = torch.baddbmm(mask[None], rows, key[0].transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), value[0]).view(shape)


AttentionInterface.register("packed_pairs", packed_attention)
AttentionMaskInterface.register("packed_pairs", sdpa_mask)  # for passes without pair_layout
AttentionInterface.register("packed_pairs_asked", packed_attention)
AttentionMaskInterface.register("packed_pairs_asked", reach_mask)
