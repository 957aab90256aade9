"""One forward over packed pairs: [prompt, chosen, rejected] per pair, several pairs in one row, no padding.

    packed row    p0 p1 p2  c0 c1 c2  r0 r1 | p0 p1  c0  r0 r1 r2 | ...
    position      0  1  2   3  4  5   3  4  | 0  1   2   2  3  4  | ...

A prompt's hidden states depend on the prompt alone, so both responses can share them; rejected tokens attend to the
prompt and to themselves, never to chosen tokens, and pairs never see each other.  This is exact: in fp64 the log-probs
equal those of sequences scored one by one to 1e-12 (tests/test_packed_model.py).  Where a model does not allow it
(`prepare_model` probes), the plain path scores sequences one by one.

Legend: B pairs, T tokens of a packed row, N response tokens, V vocabulary, H hidden size.
"""

from functools import partial

import torch
from torch import nn

import packed_probe
from formats.model_files import prompt_sees_itself
from packed_attention import CannotPack, PairLayout

HEAD_CHUNK = 1024  # tokens per piece of the language-model head: 1024 x 151,936 fp32 logits are 0.6 GB


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
        ctx.reference = None if ctx.frozen_head else reference
        ctx.chunk = chunk // 2 if reference else chunk
        wide = torch.promote_types(states.dtype, torch.float32)
        numbers = torch.empty(2 if reference else 1, len(states), dtype=wide, device=states.device)
        directed = ctx.needs_input_grad[0] and ctx.frozen_head
        directions = [torch.empty_like(states) for _ in numbers] if directed else []  # d numbers / d states
        for rows in _pieces(states, ctx.chunk):
            of_rows, gradients = _numbers_of(states, weight, targets, softcap, reference, rows, directed)
            for number, of_row in zip(numbers, of_rows):
                number[rows] = of_row
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
            _, gradients = _numbers_of(states, weight, targets, ctx.softcap, ctx.reference, rows, True)
            gradient = _weighted(gradients, grads[:, rows]).to(weight.dtype)  # (n, V)
            grad_states[rows] = gradient @ weight
            grad_weight += gradient.t() @ states[rows]
        return grad_states, grad_weight.to(weight.dtype), None, None, None, None


def _pieces(states, chunk):
    return [slice(start, start + chunk) for start in range(0, len(states), chunk)]


def _weighted(directions, grads):
    """The sum of one or two directions (n, ...), each times its grads (n,), in the type of the directions."""
    scaled = [(direction * grad[:, None]).to(direction.dtype) for direction, grad in zip(directions, grads)]
    return scaled[0] + scaled[1] if len(scaled) == 2 else scaled[0]


def _capped_logits(states, weight, softcap):
    """Logits (n, V) in at least fp32, and d logits / d raw logits (None: 1); weight None: the states are the logits."""
    logits = states.clone() if weight is None else states @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is None:
        return logits, None
    bounded = torch.tanh(logits / softcap)
    return bounded * softcap, 1 - bounded**2


def _numbers_of(states, weight, targets, softcap, reference, rows, with_gradient):
    """Of the tokens `rows`: [log-probs] or [log-probs, KLs], (n,) each, and their derivatives by the raw logits, (n, V)
    each, or [].
    """
    logits, slope = _capped_logits(states[rows], weight, softcap)
    targets = targets[rows, None]
    if reference:
        reference_states, reference_weight, reference_softcap = reference
        reference_logits = _capped_logits(reference_states[rows], reference_weight, reference_softcap)[0]
        numbers, gradients = _log_probs_and_kl(logits, reference_logits, targets, with_gradient)
    else:
        numbers, gradients = _log_probs(logits, targets, with_gradient)
    if slope is not None:
        gradients = [gradient.mul_(slope) for gradient in gradients]
    return [number[:, 0] for number in numbers], gradients


# In place: memory traffic over V is what the head costs beside its products.


def _log_probs(logits, targets, with_gradient):
    """[log p(target)] (n, 1), and [onehot - p] (n, V), its derivative by the logits (n, V), which are used up."""
    logits.sub_(logits.amax(-1, keepdim=True))
    at_target = logits.gather(-1, targets)
    exponentials = logits.exp_()
    total = exponentials.sum(-1, keepdim=True)
    if not with_gradient:
        return [at_target - total.log()], []
    return [at_target - total.log()], [_onehot_minus_p(exponentials, total, targets)]


def _log_probs_and_kl(logits, reference_logits, targets, with_gradient):
    """[log p(target), KL(p || q)], (n, 1) each, and [onehot - p, p (log p - log q - KL)], (n, V) each, their
    derivatives by the logits; q is the reference's.  Both logits are used up.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    at_target = logits.gather(-1, targets)
    exponentials = logits.exp()
    total = exponentials.sum(-1, keepdim=True)
    log_q = reference_logits.sub_(reference_logits.amax(-1, keepdim=True))
    log_q.sub_(log_q.exp().sum(-1, keepdim=True).log())  # as log p: where both are the same, to the last bit
    log_ratios = logits.sub_(total.log()).sub_(log_q)
    probabilities = exponentials / total
    kl = (probabilities * log_ratios).sum(-1, keepdim=True)
    if not with_gradient:
        return [at_target - total.log(), kl], []
    kl_gradient = probabilities.mul_(log_ratios.sub_(kl))
    return [at_target - total.log(), kl], [_onehot_minus_p(exponentials, total, targets), kl_gradient]


def _onehot_minus_p(exponentials, total, targets):
    return exponentials.div_(-total).scatter_add_(-1, targets, torch.ones_like(total))


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
    layout = layout or PairLayout(batch.segments)
    # Of four dimensions it is a mask that is ready, and transformers makes none.
    ones = torch.ones_like(batch.input_ids) if layout.ask_reach else batch.input_ids.new_ones(1, 1, 1, 1)
    position_ids, features = batch.position_ids, {}
    if batch.pictures:
        position_ids, features = _seen(backbone(model), batch)
    return backbone(model)(
        input_ids=batch.input_ids,
        position_ids=position_ids,
        attention_mask=ones,
        use_cache=False,
        pair_layout=layout,
        **features,
    ).last_hidden_state[0]  # (T, H)


def _seen(base, batch):
    """(positions, what else the model without its head takes) of a batch with pictures; each is encoded once."""
    import vision  # text has no use for it

    if base not in batch.features:
        batch.features[base] = vision.positions(base, batch), vision.encode(base, batch.pictures, batch.digests)
    position_ids, features = batch.features[base]
    return position_ids, {"mm_encoder_outputs": dict(features)}


def backbone(model):
    """The model without its head (Llama 4's base_model is the whole model)."""
    return model.base_model if model.base_model is not model else model.model


def _head_weight(model):
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise CannotPack("its head is more than one matrix")
    return head.weight


def _sequences(batch):
    """Each pair's two sequences as (prompt ids, response ids, its pictures): all chosen ones, then all rejected."""
    ids = batch.input_ids[0]
    prompts = [ids[segment.prompt_start : segment.chosen_start] for segment in batch.segments]
    chosen = [ids[segment.chosen_start : segment.rejected_start] for segment in batch.segments]
    rejected = [ids[segment.rejected_start : segment.end] for segment in batch.segments]
    pictures = batch.pictures or (None,) * len(prompts)
    return list(zip(prompts + prompts, chosen + rejected, pictures + pictures, strict=True))


def _beside(given, prompt, response, model):
    """What the model takes beside the ids of one sequence."""
    if given is None and not prompt_sees_itself(model.config):
        return {}
    import vision  # text has no use for it

    return vision.beside(given, len(prompt), len(response), model)


def _as_response(model, ids):
    """What the model takes beside ids (1, T) all of which are a response."""
    return {"token_type_ids": torch.ones_like(ids)} if prompt_sees_itself(model.config) else {}


def plain_states(model, batch):
    """response_states the plain way: one sequence at a time, the model's own logits (N, V).  Oracle and fallback."""
    predictions = []
    for prompt, response, given in _sequences(batch):
        ids, beside = torch.cat((prompt, response))[None], _beside(given, prompt, response, model)
        logits = model(input_ids=ids, use_cache=False, **beside).logits[0]
        predictions.append(logits[len(prompt) - 1 : -1])
    return torch.cat(predictions)[: len(batch.targets)], None, None  # a batch of no pairs has a made-up one: dropped


def _sum_responses(numbers, batch):
    """Per token (N,) or (2, N) -> sums over each response, 2 or 4 tensors (B,)."""
    sums = torch.stack([response.sum(-1) for response in numbers.split(batch.lengths or (0, 0), dim=-1)], dim=-1)
    sums = sums.reshape(-1, len(batch.segments))  # a row for chosen, for rejected, and so for their KLs
    sums = sums[:, : len(batch.lengths) // 2]  # a batch of no pairs has a made-up one: dropped
    return tuple(side.clone() for side in sums)  # FSDP2 hooks into what leaves a model: not into a view


def final_softcap(model):
    """Gemma's cap on the final logits, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


# -- scores of a reward model ----------------------------------------------------------------------------------------


def packed_scores(model, batch, head=None):
    """Scores of a PackedPairs batch under `head` (1, H) or `model.score`: (chosen (B,), rejected (B,)), at least fp32.

    The head reads the hidden state of each response's last token, which the layout names: token ids have no part in it.
    """
    ends = _ends(model, batch)
    wide, head = torch.promote_types(ends.dtype, torch.float32), model.score.weight if head is None else head
    return tuple(side.clone() for side in (ends.to(wide) * head.to(wide)).sum(-1).chunk(2))  # as in _sum_responses


def _ends(model, batch, layout=None):
    """Hidden states (2B, H) of each chosen, then of each rejected response's last token, as response_states."""
    if layout is not None or model.packs_pairs:
        return _packed_hidden(model, batch, layout)[batch.ends]
    ends = []
    for prompt, response, given in _sequences(batch):
        ids, beside = torch.cat((prompt, response))[None], _beside(given, prompt, response, model)
        ends.append(backbone(model)(input_ids=ids, use_cache=False, **beside).last_hidden_state[:, -1])
    return torch.cat(ends)[: len(batch.ends)]  # a batch of no pairs has a made-up one: dropped


# -- the choice of path -------------------------------------------------------------------------------------------


def prepare_model(model, example=None):
    """Dropout off, packed attention on where it is exact, and the methods `packed_logps`, `response_states` and
    `packed_scores` (of a reward model on this base) bound; says which path runs.

    Two test pairs are scored both ways (packed_probe.py), and `example`, a packed pair of the data with pictures, where
    there is one: Gemma 3's pictures see themselves whole.  The plain path is taken when not every layer calls our
    attention function (Bloom, hybrid models), when it is asked for what it does not do (Gemma2's soft cap), when the
    head is more than one matrix (a bias, an adapter, Cohere's scale), when the numbers differ, or when a response
    depends on a token that is not in its sequence.  Raises ModelError for a model that is not causal, or that computes
    otherwise in train mode.
    """
    # On the class: a method in the object's own dict would be a cycle, and keep its gigabytes alive after `del model`.
    for method in (packed_logps, response_states, packed_scores):
        setattr(type(model), method.__name__, method)

    def numbers(batch, layout):
        return torch.stack(logps_of(batch, *response_states(model, batch, layout)))

    def logits(ids):
        return model(input_ids=ids, use_cache=False, **_as_response(model, ids)).logits[0]

    states, check = partial(_packed_hidden, model), partial(_check_head, model)
    return packed_probe.choose_path(model, numbers, logits, states, check, example)


def prepare_scores(model, example=None):
    """As prepare_model, for a reward model: binds `model.packed_scores(batch)`."""
    type(model).packed_scores = packed_scores

    def hidden(ids):
        return backbone(model)(input_ids=ids, use_cache=False, **_as_response(model, ids)).last_hidden_state[0]

    return packed_probe.choose_path(
        model, partial(_ends, model), hidden, partial(_packed_hidden, model), example=example
    )


@torch.no_grad()
def _check_head(model):
    """Raise CannotPack unless the model's logits are its last hidden states times one matrix, capped or not."""
    batch = packed_probe.probe_batch(model)
    ids = batch.input_ids[:, : batch.segments[0].rejected_start]
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = _capped_logits(hidden, _head_weight(model), final_softcap(model))[0]
    if not packed_probe.distance(ours, logits) <= packed_probe.tolerance(model):
        raise CannotPack("its head is more than one matrix")
