"""Which path a model takes, found out on two test pairs: packed (packed_model.py) where that is exact, else plain, one
sequence at a time; and whether it can be trained at all: causal, and in train mode the network that it is in eval mode.
"""

import itertools
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from formats.model_files import ModelError, not_causal, prompt_sees_itself
from packed_attention import CannotPack, PairLayout
from packing import pack

LENGTHS = (7, 5, 4), (5, 4, 6)  # tokens of prompt, chosen, rejected of the test pairs
LONGEST_WINDOW = 64  # tokens: one up to here is crossed by the test pairs
EXACT = 1e-6  # of the largest gradient: what counts as none


def probe_batch(model):
    """The test pairs, packed; of tokens from all over the vocabulary.  (In two or three special tokens, 0 and 1, a
    model rounds to bf16 with an error of a tenth or more.)  The first prompt is longer than a window that is short.
    """
    config = model.config.get_text_config()
    windows = [value for name, value in vars(config).items() if "window" in name or "chunk" in name]
    windows = [value for value in windows if type(value) is int and value <= LONGEST_WINDOW]
    positions = getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW
    longer = max(0, min(max(windows, default=0), positions - sum(LENGTHS[0])))
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = ((7919 * place + 31) % vocabulary for place in itertools.count())
    (prompt, chosen, rejected), second = LENGTHS
    lengths = [(prompt + longer, chosen, rejected), second]
    return pack([[[next(ids) for _ in range(length)] for length in pair] for pair in lengths], model.device)


def choose_path(model, numbers, plain_states, packed_states, check=None, example=None):
    """Switch dropout off, and packed attention on where it is exact; returns a line for the log, which path runs.

    numbers(batch, layout): log-probs or hidden states of a PackedPairs batch, packed where a layout is given, else as
    `model.packs_pairs` says.  plain_states(ids (1, T)) and packed_states(batch, layout): (T, *), of which every row
    stands for its token.  check(): raises CannotPack for what is known beforehand.  example: a PackedPairs batch with
    pictures, which then has to give the same numbers too.
    Raises ModelError for a model that is not causal, or that computes otherwise in train mode.
    """
    disable_dropout(model)
    model.packs_pairs, training = False, model.training
    model.eval()
    own_attention = model.config.get_text_config()._attn_implementation
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.no_grad():
            batch = probe_batch(model)
            tests = [(each, numbers(each, None)) for each in (batch, example) if each is not None]
        refuse_later_tokens(model, plain_states, batch)
        try:
            if check:
                check()
            refuse_differences(model, numbers, packed_states, tests)
            model.packs_pairs, line = True, "packed pairs: on, chosen and rejected share one pass over their prompt"
        except Exception as problem:  # whatever a foreign model does here, the plain path needs nothing of it
            set_attention(model, own_attention)
            reason = str(problem) if isinstance(problem, CannotPack) else f"{type(problem).__name__}: {problem}"
            reason = reason.strip().splitlines()[0][:200]
            line = f"packed pairs: off, sequences are scored one by one ({reason})"
        line += settle_train_mode(model, partial(numbers, batch, None))
    finally:
        transformers_logging.set_verbosity(verbosity)
        model.train(training)
    return line


def set_attention(model, name):
    """Have the layers that read text call the attention function `name`; what sees pictures keeps its own."""
    config = model.config
    parts = [part for part in config.sub_configs if getattr(config, part) is config.get_text_config()]
    model.set_attn_implementation(dict.fromkeys(parts, name) or name)


def tolerance(model):
    """How far two ways of computing the same may be apart, relative to its size."""
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.05


def distance(numbers, expected):
    return ((numbers - expected).norm() / expected.norm()).item()


def refuse_differences(model, numbers, packed_states, tests):
    """Raise CannotPack where packed pairs are not what sequences alone are.  tests: [(batch, its numbers)]."""
    # By what they are, and not by their numbers alone: in bf16 those of a pair may differ by less than rounding allows.
    if prompt_sees_itself(model.config):
        raise CannotPack("the tokens of its prompts see each other")
    if any("token_type_ids" in (given or {}) for each, _ in tests for given in each.pictures):
        raise CannotPack("its pictures see themselves whole")
    batch = tests[0][0]
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    if "'dynamic'" in rope or "'longrope'" in rope:
        raise CannotPack("its rotary embedding depends on the longest sequence of the row")
    with torch.no_grad():
        set_attention(model, "packed_pairs_asked")
        layout = PairLayout(batch.segments, ask_reach=True)
        try:
            packed_states(batch, layout)
        except Exception:
            if layout.calls:
                raise
        layers = model.config.get_text_config().num_hidden_layers
        if layout.calls < layers:
            raise CannotPack(f"{layers - layout.calls} of its {layers} layers do not take our attention function")
        set_attention(model, "packed_pairs")
        for each, expected in tests:
            difference = distance(numbers(each, PairLayout(each.segments)), expected)
            if not difference <= tolerance(model):
                of_pictures = " with pictures" if each.pictures else ""
                raise CannotPack(f"the numbers of a test pair{of_pictures} differ by {difference:.2g} of their size")
    # Rounding can hide a small leak in the numbers.  In a gradient it cannot: that of what is not seen is exactly 0.
    first, second = batch.segments
    chosen = [*range(first.prompt_start, first.rejected_start - 1)]  # with its prompt, without what nobody may see
    rejected = [*range(second.prompt_start, second.chosen_start), *range(second.rejected_start, second.end - 1)]
    with embeddings_kept(model) as kept:
        states = packed_states(batch, PairLayout(batch.segments))
        for side, rows in (("chosen", chosen), ("rejected", rejected)):
            if not leak(states, kept[0], rows) <= EXACT:
                raise CannotPack(f"{side} responses depend on tokens outside of their own sequence")


def refuse_later_tokens(model, plain_states, batch):
    """Raise ModelError where what a model says of a token depends on a later one."""
    ids = batch.input_ids[:, : batch.segments[0].rejected_start]
    with embeddings_kept(model) as kept:
        try:
            leaked = leak(plain_states(ids), kept[0], list(range(ids.shape[1] // 2)))
        except (RuntimeError, IndexError):  # it has no gradient by its embeddings, and cannot be trained anyway
            return
    if leaked > EXACT:
        raise not_causal(name_of(model))


def name_of(model):
    return model.config._name_or_path or type(model).__name__


@contextmanager
def embeddings_kept(model):
    """A block with gradients in which the list it yields is filled with what the input embedding returns."""
    kept = []

    def keep(module, args, output):
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()  # some models go on in place

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            yield kept
    finally:
        hook.remove()


def leak(states, embeddings, rows):
    """The largest gradient of states (T, *) at `rows` by the embedding (1, T, H) of another token, relative to the
    largest by one of theirs.
    """
    direction = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0)).to(states)
    gradient = torch.autograd.grad((states[rows] * direction).sum(), embeddings, retain_graph=True)[0]
    sizes = gradient[0].float().norm(dim=-1)
    is_own = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    is_own[rows] = True
    return (sizes[~is_own].max() / sizes[is_own].max()).item()


# -- train mode ------------------------------------------------------------------------------------------------------


def disable_dropout(model):
    """Dropout of the base off for good, in train mode too (LoRA has its own): the reference is a fixed network, and
    gradient checkpointing is active in train mode only.  Layers that are dropped at random count as well.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        no_dropout(module)


def no_dropout(holder):
    """Set the numbers of a module or config that a forward hands to F.dropout to 0; returns whether one was not."""
    names = [name for name, value in vars(holder).items() if "drop" in name and isinstance(value, float) and value]
    for name in names:
        setattr(holder, name, 0.0)
    return bool(names)


def settle_train_mode(model, numbers):
    """See to it that numbers() is the same in train mode as in eval mode; returns what there is to say.

    A module that draws random numbers, or else computes otherwise in train mode (routers of some mixtures do), is kept
    in eval mode for good.  Raises ModelError where that does not help.
    """
    kept, expected = [], _in_mode(model, numbers, training=False)[0]
    if not expected.isfinite().all():
        return ""  # NaN equals nothing, itself neither; the first numbers of the data say that the weights are broken
    while True:
        trained, drew = _in_mode(model, numbers, training=True)
        if not drew and torch.equal(trained, expected):
            break
        path, module = at_fault(model, numbers)
        is_one_part = module not in (None, model) and not isinstance(module, GradientCheckpointingLayer)
        if is_one_part and type(module).__name__ not in kept:
            for other in [other for other in model.modules() if type(other) is type(module)]:
                keep_in_eval(other)
            kept.append(type(module).__name__)
            continue
        if no_dropout(getattr(module, "config", model.config)):  # read in every forward (Falcon); it is saved so
            continue
        noise = distance(_in_mode(model, numbers, training=False)[0], expected)  # of sums in another order each time
        if not drew and distance(trained, expected) <= max(4 * noise, EXACT):
            break
        culprit = f"its module {path} ({type(module).__name__})" if module is not None else "it"
        raise ModelError(
            f"{name_of(model)} cannot be trained as it is, in train mode {culprit} "
            f"{'draws chance' if drew else 'computes something else'} (log-probs of a test pair by "
            f"{distance(trained, expected):.2g} off): switch that off in its config.json"
        )
    return f"; {', '.join(kept)}: in training too as in evaluation" if kept else ""


@torch.no_grad()
def _in_mode(model, numbers, training):
    """(numbers(), whether it drew random numbers), in train or in eval mode; LoRA's own dropout is off."""
    model.train(training)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.eval()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            before = rng_states(model)
            return numbers(), rng_states(model) != before
    finally:
        model.eval()


def rng_states(model):
    """The states of the generators that a pass of the model can draw from."""
    states = [torch.get_rng_state()]
    if model.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(model.device))
    return [state.numpy().tobytes() for state in states]


class Call(NamedTuple):
    """A call of a module's forward; of its tensors two sums each, to tell them apart."""

    path: str
    inputs: list
    outputs: list
    drew: bool  # whether it drew random numbers


def at_fault(model, numbers):
    """(path, module), the innermost one that in train mode draws random numbers, or for the same inputs has another
    output than in eval mode; (None, None) if there is none.
    """
    calls, open_calls = [], []  # calls in the order in which they end; of open ones the inputs and RNG states

    def sums(values):
        tensors = [x.double().nan_to_num(0, 0, 0) for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        return [(x.sum().item(), x.square().sum().item()) for x in tensors]

    def begin(module, args, kwargs):
        open_calls.append((sums((args, kwargs)), rng_states(model)))

    def end(module, args, output, path):
        inputs, before = open_calls.pop()
        calls.append(Call(path, inputs, sums(output), rng_states(model) != before))

    def calls_in_mode(training):
        calls.clear()
        _in_mode(model, numbers, training)
        return list(calls)

    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(end, path=path)))
    try:
        eval_calls, train_calls = calls_in_mode(training=False), calls_in_mode(training=True)
    finally:
        for hook in hooks:
            hook.remove()
    eval_calls_of = {}
    for call in eval_calls:
        eval_calls_of.setdefault(call.path, []).append(call)
    for call in train_calls:
        same = eval_calls_of[call.path].pop(0) if eval_calls_of.get(call.path) else None
        differs = same is not None and call.inputs == same.inputs and call.outputs != same.outputs
        if call.drew or differs:
            return call.path, model.get_submodule(call.path)
    return None, None


def keep_in_eval(module):
    """Make `training` of a module False for good: a class of its own, as model.train() sets it on every module."""
    held = {"training": property(lambda self: False, lambda self, value: None)}
    module.__class__ = type(type(module).__name__, (type(module),), held)
