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
from functools import partial, reduce
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

    Without `pair_layout` it is transformers' sdpa: for generation and the plain path.  There is no attention dropout:
    the log-probs of one pair must share one network.
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
    """log softmax(softcap(states W^T))[target] per token, (N,), in pieces and in at least fp32; with a `reference`
    (its states, weight, softcap) the KL(model || reference) over the vocabulary at each token stands beneath, (2, N).

    No V-wide tensor is kept for backward.  With a frozen head the derivatives by the states, (onehot - p) W and
    p (log p - log q - KL) W, are worked out in forward, where p is at hand, and backward only scales them; a trained
    head recomputes p.  Where both are the same the KL's gradient is exactly 0; autograd's is what rounding leaves.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, softcap, chunk, reference):
        ctx.frozen_head, ctx.softcap = not ctx.needs_input_grad[1], softcap
        ctx.reference, ctx.chunk = None if ctx.frozen_head else reference, chunk // 2 if reference else chunk
        wide = torch.promote_types(states.dtype, torch.float32)
        numbers = torch.empty(2 if reference else 1, len(states), dtype=wide, device=states.device)
        directed = ctx.needs_input_grad[0] and ctx.frozen_head
        directions = [torch.empty_like(states) for _ in numbers] if directed else []
        for rows in _pieces(states, ctx.chunk):
            numbers[:, rows], gradients = _numbers(states, weight, targets, softcap, reference, rows, directed)
            for direction, gradient in zip(directions, gradients):
                direction[rows] = gradient if weight is None else gradient.to(weight.dtype) @ weight
        ctx.save_for_backward(*(directions if ctx.frozen_head else (states, weight, targets)))
        return numbers if reference else numbers[0]

    @staticmethod
    def backward(ctx, grads):  # (N,) or (2, N)
        grads = grads if grads.ndim == 2 else grads[None]
        if ctx.frozen_head:
            return _weighted(ctx.saved_tensors, grads), None, None, None, None, None
        states, weight, targets = ctx.saved_tensors
        grad_states = torch.empty_like(states)
        grad_weight = torch.zeros_like(weight, dtype=grads.dtype)
        for rows in _pieces(states, ctx.chunk):
            gradients = _numbers(states, weight, targets, ctx.softcap, ctx.reference, rows, True)[1]
            gradient = _weighted(gradients, grads[:, rows]).to(weight.dtype)  # (n, V)
            grad_states[rows] = gradient @ weight
            grad_weight += gradient.t() @ states[rows]
        return grad_states, grad_weight.to(weight.dtype), None, None, None, None


def _pieces(states, chunk):
    return [slice(start, start + chunk) for start in range(0, len(states), chunk)]


def _weighted(directions, grads):
    """The sum of directions (n, ...) times grads (n,), one for each, in the type of the directions."""
    return reduce(torch.add, [(way * grad[:, None]).to(way.dtype) for way, grad in zip(directions, grads)])


def _capped_logits(states, weight, softcap):
    """Logits (n, V) in at least fp32, and d logits / d raw logits (None: 1); weight None: the states are the logits."""
    logits = states.clone() if weight is None else states @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is None:
        return logits, None
    bounded = torch.tanh(logits / softcap)
    return bounded * softcap, 1 - bounded**2


def _numbers(states, weight, targets, softcap, reference, rows, with_gradient):
    """Of the tokens `rows`: log-probs and KLs (1 or 2, n), and their derivatives by the raw logits, each (n, V).

    log softmax's is onehot - p, the KL's p (log p - log q - KL), times the slope of the cap; in place, as memory
    traffic over V is what the head costs beside its products.
    """
    logits, slope = _capped_logits(states[rows], weight, softcap)
    targets = targets[rows, None]
    at_target = logits.sub_(logits.amax(-1, keepdim=True)).gather(-1, targets)
    exponentials = logits.exp() if reference else logits.exp_()
    total = exponentials.sum(-1, keepdim=True)
    numbers, gradients = (at_target - total.log()).t(), []
    if reference:
        log_q = _capped_logits(reference[0][rows], *reference[1:])[0]
        log_q.sub_(log_q.amax(-1, keepdim=True))
        log_q.sub_(log_q.exp().sum(-1, keepdim=True).log())  # as log p: where both are the same, to the last bit
        differences, probabilities = logits.sub_(total.log()).sub_(log_q), exponentials / total
        kl = (probabilities * differences).sum(-1, keepdim=True)
        numbers, gradients = torch.cat((numbers, kl.t())), [probabilities.mul_(differences.sub_(kl))]
    if not with_gradient:
        return numbers, []
    gradients.insert(0, exponentials.div_(-total).scatter_add_(-1, targets, torch.ones_like(total)))
    return numbers, gradients if slope is None else [gradient.mul_(slope) for gradient in gradients]


def token_logps(states, weight, targets, softcap=None, chunk=HEAD_CHUNK, reference=None):
    """log-probs (N,) of targets (N,) under a head weight (V, H) at hidden states (N, H); see TokenLogps."""
    if weight is not None and torch.is_autocast_enabled(states.device.type):
        compute = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(compute), weight.to(compute)
    return TokenLogps.apply(states, weight, targets, softcap, chunk, reference)


# -- log-probs of responses ----------------------------------------------------------------------------------------


def packed_logps(model, batch, reference=None):
    """Log-probs of a PackedPairs batch: (chosen_logps (B,), rejected_logps (B,)), sums over response tokens.

    reference: `response_states(batch)` of another model or of this one with its adapter off; then also the KL to it,
    exact at each token, summed over response tokens: (chosen_logps, rejected_logps, chosen_kl, rejected_kl).
    A method of the model (`prepare_model` binds it): a sharded model gathers its parameters around methods only.
    """
    return logps_of(batch, *response_states(model, batch), reference)


def logps_of(batch, states, weight, softcap, reference=None):
    """packed_logps from response_states that are at hand."""
    return _sum_responses(token_logps(states, weight, batch.targets, softcap, reference=reference), batch)


def response_states(model, batch, layout=None):
    """What predicts the response tokens of a PackedPairs batch: hidden states (N, H), head (V, H) and soft cap or None.

    On the plain path the model's own logits (N, V), and no head.
    """
    if layout is None and not model.packs_pairs:
        return plain_states(model, batch)
    return _packed_hidden(model, batch, layout)[batch.predictors], _head_weight(model), final_softcap(model)


def _packed_hidden(model, batch, layout=None):
    return model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.input_ids.new_ones(1, 1, 1, 1),  # "a mask is there": transformers then builds none
        use_cache=False,
        pair_layout=layout or PairLayout(batch.segments),
    ).last_hidden_state[0]  # (T, H)


def _head_weight(model):
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise CannotPack("its head is more than one matrix")
    return head.weight


def _sequences(batch):
    """Each pair's two sequences as (prompt, response) ids: all chosen ones, then all rejected."""
    ids = batch.input_ids[0]
    chosen = [(ids[start:split], ids[split:again]) for start, split, again, _ in batch.segments]
    return chosen + [(ids[start:split], ids[again:end]) for start, split, again, end in batch.segments]


def plain_states(model, batch):
    """response_states the plain way: one sequence at a time, the model's own logits (N, V).  Oracle and fallback."""
    ids = ((len(prompt), torch.cat((prompt, response))[None]) for prompt, response in _sequences(batch))
    logits = [model(input_ids=row, use_cache=False).logits[0, split - 1 : -1] for split, row in ids]
    return torch.cat(logits)[: len(batch.targets)], None, None  # of no pairs: none


def _sum_responses(numbers, batch):
    """Per token (N,) or (2, N) -> sums over each response, 2 or 4 tensors (B,)."""
    sums = torch.stack([response.sum(-1) for response in numbers.split(batch.lengths or (0, 0), dim=-1)], dim=-1)
    sums = sums.reshape(-1, len(batch.segments))[:, : len(batch.lengths) // 2]  # of no pairs: none
    return tuple(side.clone() for side in sums)  # FSDP2 hooks into what leaves a model: not into a view


def final_softcap(model):
    """Gemma's cap on the final logits, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


# -- scores of a reward model ----------------------------------------------------------------------------------------


def packed_scores(model, batch, head=None):
    """Scores of a PackedPairs batch under `head` (1, H) or `model.score`: (chosen (B,), rejected (B,)), at least fp32.

    The head reads the hidden state of each response's last token, which the layout names: token ids have no part in it.
    """
    ends = _packed_ends(model, batch) if model.packs_pairs else _plain_ends(model, batch)
    wide, head = torch.promote_types(ends.dtype, torch.float32), model.score.weight if head is None else head
    return tuple(side.clone() for side in (ends.to(wide) * head.to(wide)).sum(-1).chunk(2))  # as in _sum_responses


def _packed_ends(model, batch, layout=None):
    return _packed_hidden(model, batch, layout)[batch.ends]  # (2B, H)


def _plain_ends(model, batch):
    """The same hidden states the plain way, one sequence at a time."""
    ids = (torch.cat(pair)[None] for pair in _sequences(batch))
    ends = [model.base_model(input_ids=row, use_cache=False).last_hidden_state[:, -1] for row in ids]
    return torch.cat(ends)[: len(batch.ends)]


# -- the choice of path -------------------------------------------------------------------------------------------


def _probe_batch(model):
    """One pair as packing.pack lays it out: prompt, chosen and rejected of 6, 4 and 3 tokens from all over the
    vocabulary.  (In two or three special tokens, 0 and 1, a model rounds to bf16 with an error of a tenth or more.)
    """
    ids = [(7919 * place + 31) % model.get_input_embeddings().num_embeddings for place in range(13)]
    tensor = partial(torch.tensor, device=model.device)
    return SimpleNamespace(
        input_ids=tensor(ids)[None],
        position_ids=tensor([*range(10), *range(6, 9)])[None],
        segments=((0, 6, 10, 13),),
        predictors=tensor([5, 6, 7, 8, 5, 10, 11]),
        ends=tensor([9, 12]),
        targets=tensor(ids[6:]),
        lengths=(4, 3),
    )


def prepare_model(model):
    """Dropout off, packed attention on where it is exact, and the methods `packed_logps`, `response_states` and
    `packed_scores` (of a reward model on this base) bound; says which path runs.

    The probe scores one short pair both ways.  The plain path is taken when not every layer calls our attention
    function (Bloom, hybrid models), when it is asked for what it does not do (Gemma2's soft cap), when the head is more
    than one matrix (a bias, an adapter, Cohere's scale), or when the numbers differ.
    """
    # On the class: a method in the object's own dict would be a cycle, and keep its gigabytes alive after `del model`.
    for method in (packed_logps, response_states, packed_scores):
        setattr(type(model), method.__name__, method)
    return _choose_path(
        model,
        lambda batch: torch.stack(logps_of(batch, *plain_states(model, batch))),
        lambda batch, layout: torch.stack(logps_of(batch, *response_states(model, batch, layout))),
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
        others = model.config.get_text_config().num_hidden_layers - layout.calls
        if others:
            raise CannotPack(f"{others} of its {others + layout.calls} layers do not take our attention function")
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
    """Dropout of the base off for good, in train mode too (LoRA has its own): the reference is a fixed network, and
    gradient checkpointing is active in train mode only.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout"):  # passed to F.dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
