"""Attention over packed pairs: rejected tokens attend to their prompt and to themselves, never to chosen ones, and
pairs never see each other.

transformers calls `packed_attention` in every layer; a `PairLayout` tells it where the pairs stand.  How far back a
layer looks is part of the mask that transformers makes for it (PhiMoE, Qwen2-MoE and others say it nowhere else).  A
packed pass makes no such mask.  So one pass of the probe (packed_probe.py) has transformers make its masks by
`reach_mask`, and each layer notes its reach.
"""

import math

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_HAND = 512  # keys up to which attention in bf16 on a CPU is faster by hand than torch's (docs/results.md)
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


class PairLayout:
    """Where the pairs of a packed row stand, and the attention masks of their rejected branches."""

    def __init__(self, segments, ask_reach=False):
        self.segments = segments  # of PackedPairs
        self.masks = {}  # the same in every layer, so built once: (queries, keys, reach) -> mask
        self.calls = 0
        self.ask_reach = ask_reach  # the layers are to note their reach, which they are given in the place of a mask

    def mask(self, num_queries, num_keys, reach, like, copies=1):
        """(copies * queries, keys), 0 where seen, else -inf: the last query stands at the last key; of the type and on
        the device of `like`.
        """
        key = num_queries, num_keys, reach
        if key not in self.masks:
            keys = torch.arange(num_keys, device=like.device)
            queries = torch.arange(num_keys - num_queries, num_keys, device=like.device).view(-1, 1)
            unseen = sees(queries, keys, reach).logical_not()
            mask = torch.zeros(unseen.shape, dtype=like.dtype, device=like.device).masked_fill_(unseen, -math.inf)
            self.masks[key] = mask.repeat(copies, 1)
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
    scaling, reach = kwargs.get("scaling"), module.pair_reach
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
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


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
    """Whether torch's attention takes grouped heads here without a matrix of scores, tokens x tokens for each head,
    that stays for backward.  On CUDA only flash attention does: without a mask, in 2 bytes, up to a head size of 256.
    """
    if query.device.type != "cuda":
        return True
    fits = query.element_size() == 2 and query.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


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
