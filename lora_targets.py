"""Which layers of a model a LoRA adapter goes on, and in words which weights get none.

select_targets(model)              # the default: every linear of the blocks that works here and in plain PEFT
select_targets(model, ["q_proj"])  # by name, as PEFT matches names
print(*left_out(model), sep="\\n")  # what stays as it is, for the log and the model card
"""

import re
from collections import Counter

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from formats.user_errors import UserError

OF_EXPERTS = "gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"
REASONS = {
    "names of experts": "PEFT takes their names for those of the experts, and would load an adapter in part",
    "kernel": "the GPU kernels of a state-space layer read such weights past an adapter",
    "shared": "they share a weight with another layer",
}


class AdapterError(UserError):
    """An adapter that does not fit: one sentence for the user."""


# -- what can carry an adapter ---------------------------------------------------------------------------------------


def adaptable_linears(model):
    """{module path: layer} of the linear layers that can carry an adapter, the language-model head included.

    Not a subclass: it may have a forward of its own (routers, grouped and fake-quantised linears), or be read past it
    (the last product of nn.MultiheadAttention).  And nothing that text does not go through, such as a vision tower.
    """
    text = _text_modules(model)
    return {path: m for path, m in model.named_modules() if m in text and (_adapted(m) or _is_plain(m))}


def _adapted(module):
    return hasattr(module, "lora_A")  # lora.LoRALinear


def _is_plain(module):
    """Whether it computes W x + b: FalconLinear's own forward does."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def text_decoder(model):
    """What of a model reads text: of a vision-language model not what sees, else the model without its head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return decoder if isinstance(decoder, PreTrainedModel) else model  # ModernBERT calls its head `decoder`


def train_text(model):
    """What is trained where all weights are: all but what a vision-language model sees with, its tower and projector,
    which is frozen here.  What it makes of a picture is then a constant.
    """
    decoder = text_decoder(model)
    around = [module for module in model.modules() if any(part is decoder for part in module.modules())]
    heads = [child for child in model.children() if child not in around]
    trained = {parameter for part in (decoder, *heads) for parameter in part.parameters()}
    for parameter in model.parameters():
        if parameter not in trained:
            parameter.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter in trained]


def _text_modules(model):
    """The modules of the text decoder and, beside it, the heads, which are children of the model itself."""
    decoder = text_decoder(model)
    inside = [module for module in decoder.modules() if module is not decoder]
    towers = [module for module in inside if getattr(module, "main_input_name", "input_ids") != "input_ids"]
    return {*decoder.modules(), *model.children()} - {part for tower in towers for part in tower.modules()}


def _in_block(path):
    return re.search(r"\.\d+\.", path) is not None  # as in layers.3.mlp.up_proj


# -- what does -------------------------------------------------------------------------------------------------------


def select_targets(model, target_modules=None):
    """Paths of the layers to adapt.

    None or ["all-linear"]: every linear of the blocks that works here and in plain PEFT.  Else names matched at the end
    of the path, as PEFT does, or one regular expression (str) for the whole path.  Raises AdapterError when nothing
    matches, or for a layer that shares its weight.
    """
    linears = adaptable_linears(model)
    if target_modules in (None, "all-linear", ["all-linear"]):
        beside = {path for paths in _not_by_default(model).values() for path in paths}
        targets = [path for path in linears if _in_block(path) and path not in beside]
        if not targets:
            raise AdapterError("no linear layer of this model can carry an adapter: train all weights with --lora-r 0")
        return targets
    targets = [path for path in linears if matches(path, target_modules)]
    if not targets:
        wanted = target_modules if isinstance(target_modules, str) else " or ".join(target_modules)
        there_are = ", ".join(_names(path for path in linears if _in_block(path)))
        raise AdapterError(
            f"no linear layer of this model is called {wanted}: names for --lora-target-modules are {there_are}"
        )
    if "score" in targets:
        raise AdapterError(
            "score is the head of the reward model, which is trained whole: leave it out of --lora-target-modules"
        )
    embeddings, shared = model.get_input_embeddings(), _shared_weights(model)
    for path in targets:
        if linears[path].weight in shared:
            tied = embeddings is not None and linears[path].weight is embeddings.weight
            other = "the input embeddings" if tied else "another layer"
            raise AdapterError(
                f"{path} shares its weight with {other}, and an adapter would change only one of the two: "
                "leave it out of --lora-target-modules"
            )
    return targets


def matches(path, target_modules):
    """Whether a path is one of target_modules, as PEFT matches them: names, or one regular expression."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, path) is not None
    return any(path == target or path.endswith("." + target) for target in target_modules)


def _not_by_default(model):
    """{one of REASONS: paths} of linears of the blocks that could carry an adapter and by default have none."""
    shared, fused = _shared_weights(model), _fuses_experts(model)
    paths = {reason: [] for reason in REASONS}
    for path, layer in adaptable_linears(model).items():
        owner, _, name = path.rpartition(".")
        owner = model.get_submodule(owner)
        if not _in_block(path):
            continue
        if layer.weight in shared:
            paths["shared"].append(path)
        elif hasattr(owner, "A_log") and hasattr(owner, "D") and name != "in_proj":  # Mamba and its like
            paths["kernel"].append(path)
        elif fused and name in OF_EXPERTS:
            paths["names of experts"].append(path)
    return paths


def _shared_weights(model):
    """Weights that stand in two places: an adapter on one, merged, would change both."""
    owners = [module for _, module in model.named_modules(remove_duplicate=False)]
    times = Counter(weight for owner in owners for weight in owner._parameters.values() if weight is not None)
    return {weight for weight, number in times.items() if number > 1}


def _fuses_experts(model):
    """Whether transformers joins the experts of the checkpoints of this type, which were linears, into one parameter.

    For adapters from before, PEFT then reads the targets `gate_proj`, ... as the experts: also where they are a dense
    layer or a shared expert.
    """
    config = getattr(model, "config", None)
    kinds = {config.model_type, config.get_text_config().model_type} if config else ()
    conversions = [conversion for kind in kinds for conversion in get_checkpoint_conversion_mapping(kind) or ()]
    return any("experts" in target for conversion in conversions for target in conversion.target_patterns)


# -- in words --------------------------------------------------------------------------------------------------------


def left_out(model):
    """Sentences on the weights of the text model that have no adapter, for the log and the card of a run.

    None where the model carries no adapter at all: then all weights are trained.
    """
    paths = {path for path, module in model.named_modules() if _adapted(module)}
    if not paths:
        return None
    lines, experts, own = [], _expert_weights(model), _with_own_forward(model)
    if experts:
        number = sum(weight.numel() for weight in experts.values())
        weights = f"{number:,} weights of experts ({', '.join(_names(experts))})"
        reason = "a parameter holds those of a whole block, and it is no linear layer"
        lines.append(f"{weights} get no adapter: {reason}")
    for kind in sorted({type(module).__name__ for module in own.values()}):
        of_kind = [path for path, module in own.items() if type(module).__name__ == kind]
        lines.append(f"{len(of_kind)} {kind} ({', '.join(_names(of_kind))}) without an adapter: no plain nn.Linear")
    for reason, passed_over in _not_by_default(model).items():
        adapted = [path for path in passed_over if path in paths]
        if adapted:
            lines.append(f"{_counted(adapted)} with an adapter, as asked, but {REASONS[reason]}")
        elif passed_over and paths == set(select_targets(model)):
            lines.append(f"{_counted(passed_over)} without an adapter by default: {REASONS[reason]}")
    return lines


def _counted(paths):
    layers = "linear layers" if len(paths) > 1 else "linear layer"
    return f"{len(paths)} {layers} ({', '.join(_names(paths))})"


def _names(paths):
    """The last words of paths, each once, in order."""
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def _expert_weights(model):
    """{path: parameter} of the experts that are no linear layers."""
    text = _text_modules(model)
    experts = {
        path: module
        for path, module in model.named_modules()
        if module in text and "expert" in f"{path} {type(module).__name__}".lower() and ".lora_" not in path
    }
    return {
        f"{path}.{name}": weight
        for path, module in experts.items()
        for name, weight in module._parameters.items()
        if weight is not None and weight.ndim > 1 and not (_adapted(module) or isinstance(module, (nn.Linear, Conv1D)))
    }


def _with_own_forward(model):
    """{path: layer} of the text model's subclasses of linear layers."""
    text = _text_modules(model)
    linears = {path: m for path, m in model.named_modules() if m in text and isinstance(m, (nn.Linear, Conv1D))}
    return {path: module for path, module in linears.items() if not _is_plain(module)}
