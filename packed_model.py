"""One forward over packed pairs: [prompt, chosen, rejected] per pair, several pairs in one row, no padding.

    packed row    p0 p1 p2  c0 c1 c2  r0 r1 | p0 p1  c0  r0 r1 r2 | ...
    position      0  1  2   3  4  5   3  4  | 0  1   2   2  3  4  | ...

A prompt's hidden states depend on the prompt alone, so both responses can share them; rejected tokens attend to the
prompt and to themselves, never to chosen tokens, and pairs never see each other.  This is exact: in fp64 the log-probs
equal those of sequences scored one by one to 1e-12 (tests/test_packed_model.py).  Where a model does not allow it
(`prepare_model` probes), the plain path scores sequences one by one.

Legend: B pairs, T tokens of a packed row, N response tokens, V vocabulary, H hidden size.
"""

import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

BY_HAND = 512  # keys up to which attention in bf16 on a CPU is faster by hand than torch's (docs/results.md)
HEAD_CHUNK = 1024  # tokens per piece of the language-model head: 1024 x 151,936 fp32 logits are 0.6 GB


class CannotPack(Exception):
    """This model's attention asks for something that packed attention does not do."""


# -- attention over packed pairs -----------------------------------------------------------------------------------

HONOURED = {"scaling", "sliding_window", "dropout", "position_ids", "use_cache", "is_causal", "cache_position"}
HONOURED |= {"output_attentions", "output_hidden_states", "return_dict"}


class PairLayout:
    """Where the pairs of a packed row stand, and the attention masks of their rejected branches."""

    def __init__(self, segments):
        self.segments = segments  # per pair (prompt start, chosen start, rejected start, end)
        self.masks = {}  # the same in every layer, so built once: (queries, keys, window) -> mask
        self.calls = 0

    def mask(self, num_queries, num_keys, window, like, copies=1):
        """(copies * queries, keys), 0 where seen, else -inf: causal, the last query at the last key, at most `window`
        keys; of the type and on the device of `like`."""
        key = num_queries, num_keys, window
        if key not in self.masks:
            keys = torch.arange(num_keys, device=like.device)
            queries = keys[num_keys - num_queries :, None]
            unseen = keys > queries
            if window is not None:
                unseen |= keys <= queries - window
            mask = torch.zeros(unseen.shape, dtype=like.dtype, device=like.device).masked_fill_(unseen, -math.inf)
            self.masks[key] = mask.repeat(copies, 1)
        return self.masks[key]


def packed_attention(module, query, key, value, attention_mask, pair_layout=None, **kwargs):
    """transformers attention function: query (1, heads, T, D), key and value (1, kv heads, T, D) -> (1, T, heads, D).

    Without `pair_layout` it is transformers' sdpa, so generation and the plain path work on the same model.
    Attention dropout is not applied: the log-probs of one pair must share one network.
    """
    if pair_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    unknown = [name for name, given in kwargs.items() if given is not None and name not in HONOURED]
    if unknown:
        raise CannotPack(f"its attention takes {', '.join(unknown)}")
    pair_layout.calls += 1
    scaling, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    groups = query.shape[1] // key.shape[1]

    def attend(q, k, v):  # (1, heads, tokens, D)
        whole = window is None or k.shape[2] <= window  # the window cuts nothing off
        if q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[2] <= BY_HAND:
            mask = pair_layout.mask(q.shape[2], k.shape[2], None if whole else window, q, copies=groups)
            return attention_by_hand(q, k, v, mask, scaling)
        if whole and q.shape[2] == k.shape[2]:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        if groups > 1:  # with a mask, CUDA's fast kernels do not take grouped heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mask = pair_layout.mask(q.shape[2], k.shape[2], None if whole else window, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)

    # By split, whose backward is one cat; that of a slice is a tensor of zeros as large as the whole, for each slice.
    bounds = [(split - start, again - split, end - again) for start, split, again, end in pair_layout.segments]
    branches = [size for prompt, chosen, rejected in bounds for size in (prompt + chosen, rejected)]
    prompts = [size for prompt, chosen, rejected in bounds for size in (prompt, chosen + rejected)]
    parts = [x.split(branches, 2)[branch::2] for branch in (0, 1) for x in (query, key, value)]
    parts += [x.split(prompts, 2)[::2] for x in (key, value)]
    outputs = []
    for q, k, v, rejected_q, rejected_k, rejected_v, prompt_k, prompt_v in zip(*parts, strict=True):
        outputs.append(attend(q, k, v))  # prompt + chosen
        outputs.append(attend(rejected_q, torch.cat((prompt_k, rejected_k), 2), torch.cat((prompt_v, rejected_v), 2)))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


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


# -- the language-model head, on response tokens only ----------------------------------------------------------------


class TokenLogps(torch.autograd.Function):
    """log softmax(softcap(hidden W^T))[target] per token, (N,), in pieces and in at least fp32.

    No V-wide tensor is kept for backward.  With a frozen head the derivative by the hidden state, W[target] - p W, is
    worked out in forward, where p is at hand, and backward only scales it; a trained head recomputes p.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, chunk):
        logps = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        ctx.frozen_head = not ctx.needs_input_grad[1]
        direction = torch.empty_like(hidden) if ctx.needs_input_grad[0] and ctx.frozen_head else None
        for rows in _pieces(len(hidden), chunk):
            logps[rows], gradient = _logps(hidden[rows], weight, targets[rows], softcap, direction is not None)
            if direction is not None:
                direction[rows] = gradient.to(weight.dtype) @ weight
        ctx.softcap, ctx.chunk = softcap, chunk
        ctx.save_for_backward(*((direction,) if ctx.frozen_head else (hidden, weight, targets)))
        return logps

    @staticmethod
    def backward(ctx, grad):  # (N,)
        if ctx.frozen_head:
            (direction,) = ctx.saved_tensors
            return (direction * grad[:, None]).to(direction.dtype), None, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        for rows in _pieces(len(hidden), ctx.chunk):
            gradient = _logps(hidden[rows], weight, targets[rows], ctx.softcap, with_gradient=True)[1]
            gradient = gradient.mul_(grad[rows, None]).to(weight.dtype)  # (n, V)
            grad_hidden[rows] = gradient @ weight
            grad_weight += gradient.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _pieces(length, chunk):
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def _capped_logits(hidden, weight, softcap):
    """Logits (n, V) in at least fp32, and d logits / d raw logits (None: 1)."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is None:
        return logits, None
    bounded = torch.tanh(logits / softcap)
    return bounded * softcap, 1 - bounded**2


def _logps(hidden, weight, targets, softcap, with_gradient):
    """log softmax(logits)[target] (n,), and its derivative by the raw logits or None, onehot - softmax (times the slope
    of the cap), (n, V); in place, as memory traffic over V is what the head costs beside its products.
    """
    logits, slope = _capped_logits(hidden, weight, softcap)
    top = logits.amax(-1, keepdim=True)
    at_target = logits.gather(-1, targets[:, None]) - top
    exponentials = logits.sub_(top).exp_()
    total = exponentials.sum(-1, keepdim=True)
    logps = (at_target - total.log()).squeeze(-1)
    if not with_gradient:
        return logps, None
    gradient = exponentials.div_(-total).scatter_add_(-1, targets[:, None], torch.ones_like(total))
    return logps, gradient if slope is None else gradient.mul_(slope)


def token_logps(hidden, weight, targets, softcap=None, chunk=HEAD_CHUNK):
    """log-probs (N,) of targets (N,) under a head weight (V, H) at hidden states (N, H); see TokenLogps."""
    if torch.is_autocast_enabled(hidden.device.type):
        compute = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(compute), weight.to(compute)
    return TokenLogps.apply(hidden, weight, targets, softcap, chunk)


# -- log-probs of responses ----------------------------------------------------------------------------------------


def packed_logps(model, batch):
    """Log-probs of a PackedPairs batch: (chosen_logps (B,), rejected_logps (B,)), sums over response tokens.

    A method of the model (`prepare_model` binds it), backbone and head in one call: a sharded model gathers its
    parameters around registered methods only.
    """
    if not model.packs_pairs:
        return plain_logps(model, batch)
    return _packed_logps(model, batch, PairLayout(batch.segments))


def _packed_logps(model, batch, layout):
    hidden = _packed_hidden(model, batch, layout)
    weight, softcap = _head_weight(model), final_softcap(model)
    return _sum_responses(token_logps(hidden[batch.predictors], weight, batch.targets, softcap), batch)


def _packed_hidden(model, batch, layout):
    return model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.input_ids.new_ones(1, 1, 1, 1),  # "a mask is there": transformers then builds none
        use_cache=False,
        pair_layout=layout,
    ).last_hidden_state[0]  # (T, H)


def _head_weight(model):
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise CannotPack("its head is more than one matrix")
    return head.weight


def plain_logps(model, batch):
    """The same numbers the plain way: one sequence at a time, the model's own logits.  Oracle and fallback."""
    ids = batch.input_ids[0]
    chosen, rejected = [], []
    for start, split, again, end in batch.segments:
        prompt = ids[start:split]
        for response, per_token_logps in ((ids[split:again], chosen), (ids[again:end], rejected)):
            sequence = torch.cat((prompt, response))[None]
            logits = model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            per_token_logps.append(logits.log_softmax(-1).gather(-1, response[:, None]).squeeze(-1))
    return _sum_responses(torch.cat(chosen + rejected), batch)


def _sum_responses(per_token_logps, batch):
    return torch.stack([response.sum() for response in per_token_logps.split(batch.lengths)]).chunk(2)


def final_softcap(model):
    """Gemma's cap on the final logits, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


# -- scores of a reward model ----------------------------------------------------------------------------------------


def packed_scores(model, batch):
    """Scores of a PackedPairs batch under `model.score` (1, H): (chosen (B,), rejected (B,)), in at least fp32.

    The head reads the hidden state of each response's last token, which the layout names: token ids have no part in it.
    """
    ends = _packed_ends(model, batch, PairLayout(batch.segments)) if model.packs_pairs else _plain_ends(model, batch)
    wide = torch.promote_types(ends.dtype, torch.float32)
    return (ends.to(wide) * model.score.weight.to(wide)).sum(-1).chunk(2)


def _packed_ends(model, batch, layout):
    return _packed_hidden(model, batch, layout)[batch.ends]  # (2B, H)


def _plain_ends(model, batch):
    """The same hidden states the plain way, one sequence at a time."""
    ids, ends = batch.input_ids[0], ([], [])
    for start, split, again, end in batch.segments:
        for side, response in zip(ends, (ids[split:again], ids[again:end]), strict=True):
            sequence = torch.cat((ids[start:split], response))[None]
            side.append(model.base_model(input_ids=sequence, use_cache=False).last_hidden_state[0, -1])
    return torch.stack(ends[0] + ends[1])


# -- the choice of path -------------------------------------------------------------------------------------------


def _probe_batch(model):
    """One pair as packing.pack lays it out: prompt, chosen and rejected of 6, 4 and 3 tokens from all over the
    vocabulary.  (In two or three special tokens, 0 and 1, a model rounds to bf16 with an error of a tenth or more.)
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [(7919 * place + 31) % vocabulary for place in range(13)]

    def tensor(*numbers):
        return torch.tensor(numbers, device=model.device)

    return SimpleNamespace(
        input_ids=tensor(*ids)[None],
        position_ids=tensor(*range(10), *range(6, 9))[None],
        segments=((0, 6, 10, 13),),
        predictors=tensor(5, 6, 7, 8, 5, 10, 11),
        ends=tensor(9, 12),
        targets=tensor(*ids[6:]),
        lengths=(4, 3),
    )


def prepare_model(model):
    """Dropout off, `model.packed_logps(batch)` bound, packed attention on where it is exact; says which path runs.

    The probe scores one short pair both ways.  The plain path is taken when not every layer calls
    our attention function (Bloom does not use transformers' interface, hybrid models have other layers too), when it is
    asked for what it does not do (Gemma2's soft cap), when the head is more than one matrix (a bias, an adapter,
    Cohere's scale), or when the numbers differ.
    """
    # On the class: a method in the object's own dict would be a cycle, and keep its gigabytes alive after `del model`.
    type(model).packed_logps = packed_logps
    return _choose_path(
        model,
        lambda batch: torch.stack(plain_logps(model, batch)),
        lambda batch, layout: torch.stack(_packed_logps(model, batch, layout)),
    )


def prepare_scores(model):
    """As prepare_model, for a reward model: binds `model.packed_scores(batch)`."""
    type(model).packed_scores = packed_scores
    return _choose_path(model, partial(_plain_ends, model), partial(_packed_ends, model))


def _choose_path(model, plain, packed):
    disable_dropout(model)
    model.packs_pairs = False
    own_attention, verbosity = model.config._attn_implementation, transformers_logging.get_verbosity()
    batch, tolerance = _probe_batch(model), 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.05
    try:
        rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
        if "'dynamic'" in rope or "'longrope'" in rope:
            raise CannotPack("its rotary embedding depends on the longest sequence of the row")
        transformers_logging.set_verbosity_error()
        with torch.no_grad():
            expected = plain(batch)
            if model.get_output_embeddings() is not None:
                logits = model(input_ids=batch.input_ids, use_cache=False).logits[0].float()
                hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state[0]
                ours = _capped_logits(hidden, _head_weight(model), final_softcap(model))[0]
                if (ours - logits).norm() > tolerance * logits.norm():
                    raise CannotPack("its head is more than one matrix")
            model.set_attn_implementation("packed_pairs")
            layout = PairLayout(batch.segments)
            difference = (packed(batch, layout) - expected).norm() / expected.norm()
        num_layers = model.config.get_text_config().num_hidden_layers
        if layout.calls != num_layers:
            others = num_layers - layout.calls
            raise CannotPack(f"{others} of its {num_layers} layers do not take our attention function")
        if not difference <= tolerance:
            raise CannotPack(f"the numbers of a test pair differ by {difference:.2g} of their size")
    except Exception as problem:  # whatever a foreign model does here, the plain path needs nothing of it
        model.set_attn_implementation(own_attention)
        reason = str(problem) if isinstance(problem, CannotPack) else f"{type(problem).__name__}: {problem}"
        return f"packed pairs: off, sequences are scored one by one ({reason.strip().splitlines()[0][:200]})"
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.packs_pairs = True
    return "packed pairs: on, chosen and rejected share one pass over their prompt"


def disable_dropout(model):
    """Dropout of the base model off for good, in train mode too (LoRA has its own).

    The reference must be a fixed network, and gradient checkpointing is active in train mode only.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout"):  # passed to F.dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
