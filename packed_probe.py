"""Which path a model takes, found out on two test pairs: packed (packed_model.py) where that is exact, else plain, one
sequence at a time; and whether it can be trained at all: causal, and in train mode the network that it is in eval mode.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from model_files import ModelError
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
    vocabulary, sizes = model.get_input_embeddings().num_embeddings, [list(each) for each in LENGTHS]
    sizes[0][0] += longer
    ids = iter([(7919 * place + 31) % vocabulary for place in range(sum(map(sum, sizes)))])
    return pack([[[next(ids) for _ in range(size)] for size in each] for each in sizes], model.device)


def choose_path(model, numbers, plain_states, packed_states, check=None):
    """Switch dropout off, and packed attention on where it is exact; returns a line for the log, which path runs.

    numbers(batch, layout): log-probs or hidden states of a PackedPairs batch, packed where a layout is given, else as
    `model.packs_pairs` says.  plain_states(ids (1, T)) and packed_states(batch, layout): (T, *), of which every row
    stands for its token.  check(): raises CannotPack for what is known beforehand.
    Raises ModelError for a model that is not causal, or that computes otherwise in train mode.
    """
    disable_dropout(model)
    model.packs_pairs, training = False, model.training
    model.eval()
    own_attention, verbosity = model.config._attn_implementation, transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.no_grad():
            batch = probe_batch(model)
            expected = numbers(batch, None)
        refuse_later_tokens(model, plain_states, batch)
        try:
            if check:
                check()
            refuse_differences(model, numbers, packed_states, batch, expected)
            model.packs_pairs, line = True, "packed pairs: on, chosen and rejected share one pass over their prompt"
        except Exception as problem:  # whatever a foreign model does here, the plain path needs nothing of it
            model.set_attn_implementation(own_attention)
            reason = str(problem) if isinstance(problem, CannotPack) else f"{type(problem).__name__}: {problem}"
            reason = reason.strip().splitlines()[0][:200]
            line = f"packed pairs: off, sequences are scored one by one ({reason})"
        line += settle_train_mode(model, partial(numbers, batch, None))
    finally:
        transformers_logging.set_verbosity(verbosity)
        model.train(training)
    return line


def tolerance(model):
    """How far two ways of computing the same may be apart, relative to its size."""
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.05


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def refuse_differences(model, numbers, packed_states, batch, expected):
    """Raise CannotPack where packed pairs are not what sequences alone are."""
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    if "'dynamic'" in rope or "'longrope'" in rope:
        raise CannotPack("its rotary embedding depends on the longest sequence of the row")
    with torch.no_grad():
        model.set_attn_implementation("packed_pairs_asked")
        packed_states(batch, PairLayout(batch.segments, ask_reach=True))
        model.set_attn_implementation("packed_pairs")
        layout = PairLayout(batch.segments)
        difference = distance(numbers(batch, layout), expected)
    layers = model.config.get_text_config().num_hidden_layers
    if layout.calls < layers:
        raise CannotPack(f"{layers - layout.calls} of its {layers} layers do not take our attention function")
    if not difference <= tolerance(model):
        raise CannotPack(f"the numbers of a test pair differ by {difference:.2g} of their size")
    # Rounding can hide a small leak in the numbers.  In a gradient it cannot: that of what is not seen is exactly 0.
    (start, split, again, _), (other, its_split, its_again, its_end) = batch.segments
    chosen = range(start, again - 1)  # with its prompt; of the last token nothing is to be seen
    rejected = [*range(other, its_split), *range(its_again, its_end - 1)]
    with embeddings_kept(model) as kept:
        states = packed_states(batch, PairLayout(batch.segments))
        for rows, what in ((chosen, "chosen"), (rejected, "rejected")):
            if not leak(states, kept[0], list(rows)) <= EXACT:
                raise CannotPack(f"{what} responses depend on tokens outside of their own sequence")


def refuse_later_tokens(model, plain_states, batch):
    """Raise ModelError where what a model says of a token depends on a later one."""
    ids = batch.input_ids[:, : batch.segments[0][2]]
    with embeddings_kept(model) as kept:
        states = plain_states(ids)
        if kept and states.requires_grad and leak(states, kept[0], list(range(ids.shape[1] // 2))) > EXACT:
            raise ModelError(
                f"{name_of(model)} is no causal language model, what it says of a token depends on later ones (an "
                "encoder, or a model that sees both sides): name a decoder"
            )


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
    theirs = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    theirs[rows] = True
    return (sizes[~theirs].max() / sizes[theirs].max()).item()


# -- train mode ------------------------------------------------------------------------------------------------------


def disable_dropout(model):
    """Dropout of the base off for good, in train mode too (LoRA has its own): the reference is a fixed network, and
    gradient checkpointing is active in train mode only.  Layers that are dropped at random count as well.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # numbers that a forward hands to F.dropout
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def settle_train_mode(model, numbers):
    """See to it that numbers() is the same in train mode as in eval mode; returns what there is to say.

    Modules that draw chance all the same (the routers of some mixtures do) are kept in eval mode for good.  Raises
    ModelError where that does not help.
    """
    held, expected = [], _without_gradient(model, numbers, training=False)
    while True:
        found = [_without_gradient(model, numbers, training=True, seed=seed) for seed in (1, 2)]
        if all(torch.equal(each, expected) for each in found):
            break
        path, module = first_to_differ(model, numbers)
        if module is not None and not isinstance(module, GradientCheckpointingLayer) and module is not model:
            name = type(module).__name__
            for each in [each for each in model.modules() if type(each) is type(module)]:
                keep_in_eval(each)
            held.append(name)
            continue
        again = distance(_without_gradient(model, numbers, training=True, seed=1), found[0])
        chance, difference = distance(found[1], found[0]), distance(found[0], expected)
        if max(chance, difference) <= max(4 * again, EXACT):  # kernels that add in another order each time
            break
        where = f"its module {path} ({type(module).__name__})" if module is not None else "it"
        raise ModelError(
            f"{name_of(model)} cannot be trained as it is, in train mode {where} does not compute what it does in eval "
            f"mode ({difference:.2g} of the numbers of a test pair): look there for dropout or other chance that "
            "config.json can switch off"
        )
    return f"; {', '.join(held)}: drawn by chance in training, so kept in eval mode" if held else ""


@torch.no_grad()
def _without_gradient(model, numbers, training, seed=0):
    """numbers() in train or eval mode, with a seed; LoRA's own dropout is off."""
    model.train(training)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return numbers()
    finally:
        model.eval()


def first_to_differ(model, numbers):
    """(path, module), the innermost one whose output in train mode is another than in eval mode for the same inputs, or
    (None, None).
    """
    calls, inputs = [], []  # calls in the order in which they end

    def sums(values):
        tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        return [(x.double().sum().item(), x.double().square().sum().item()) for x in tensors]

    hooks = []
    for path, module in model.named_modules():
        before = lambda module, args, kwargs: inputs.append(sums((args, kwargs)))
        after = lambda module, args, output, path=path: calls.append((path, inputs.pop(), sums(output)))
        hooks += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        passes = []
        for training, seed in ((False, 0), (True, 1), (True, 2)):
            calls.clear()
            inputs.clear()
            _without_gradient(model, numbers, training, seed)
            passes.append(list(calls))
    finally:
        for hook in hooks:
            hook.remove()
    for found in passes[1:]:
        known = {}
        for path, given, output in passes[0]:
            known.setdefault(path, []).append((given, output))
        for path, given, output in found:
            expected = known[path].pop(0) if known.get(path) else (None, None)
            if given == expected[0] and output != expected[1]:
                return path, model.get_submodule(path)
    return None, None


def keep_in_eval(module):
    """Make `training` of a module False for good: a class of its own, as model.train() sets it on every module."""
    held = {"training": property(lambda self: False, lambda self, value: None)}
    module.__class__ = type(type(module).__name__, (type(module),), held)
