"""Models and tokenizers from a folder or a hub, with every failure as one sentence."""

import re
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from formats import hub_files, written_files
from formats.chat_text import turn_end
from formats.json_files import read_object
from formats.tensor_files import check_readable, unmap
from formats.user_errors import UserError, is_out_of_memory

# What a tokenizer is read from, beside a model.
TOKENIZER = "tokenizer*", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.*"


class ModelError(UserError):
    """A model that cannot be loaded or used: one sentence for the user."""


def load_tokenizer(path, trust_remote_code=False):
    """Tokenizer of a folder or hub id.  Raises ModelError."""
    if damage := written_files.damage(path, *TOKENIZER):
        raise ModelError(damage)
    load = partial(_from, AutoTokenizer, path, trust_remote_code=trust_remote_code)
    tokenizer = _loaded("tokenizer", path, load)
    _loaded("tokenizer", path, partial(tokenizer, "a"))  # some settings of other types are found out when it is used
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {path} has no end-of-sequence token: set eos_token in tokenizer_config.json"
        )
    return tokenizer


def base_of(adapters):
    """The base model that the adapter_config.json of all `adapters` (folders) names.  Raises ModelError."""
    bases = {}  # the base, by its place on the disk where it has one: (as it is named, the adapter)
    for folder in adapters:
        try:
            name = read_object(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
        except (FileNotFoundError, NotADirectoryError):
            raise ModelError(f"{folder} is not an adapter folder: adapter_config.json is missing") from None
        except (OSError, ValueError):
            name = None
        if not name or not isinstance(name, str):
            raise ModelError(f"{folder}/adapter_config.json names no base model: name it with --model")
        place = Path(name).resolve() if _exists(name) else name
        bases.setdefault(place, (name, folder))
    (base, first), *others = bases.values()
    if others:
        other, second = others[0]
        raise ModelError(f"{first} was trained on {base} and {second} on {other}: name one base with --model")
    return base


def load_model(path, dtype, device, trust_remote_code=False, scores=False, max_length=0):
    """Causal language model of a folder or hub id in `dtype` on `device`, in eval mode.  Raises ModelError.

    scores: a reward model instead, whose head `score` (1, H), fp32, is the saved one or, on a base, zero: the first
    loss is then ln 2, and no draw decides what the score begins with.  max_length: tokens that it has to take.
    """
    if damage := written_files.damage(path, *written_files.WHOLE_MODEL):
        raise ModelError(damage)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    config = load_config(path, trust_remote_code)
    check_positions(config, max_length, f"a text of {max_length} tokens", path)
    kind, options = _class_of(config, scores), {"num_labels": 1} if scores else {}
    options |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of the weights is many lines, and below it is one
    try:
        model, loading_info = _loaded("model", path, partial(_from, kind, path, weights=True, **options))
    finally:
        transformers_logging.set_verbosity(verbosity)
    if loading_info["mismatched_keys"]:
        name, in_file, wanted = min(loading_info["mismatched_keys"])
        raise ModelError(
            f"{name} of {path} is {tuple(in_file)}, and its config.json asks for {tuple(wanted)}: they are of two "
            "models"
        )
    missing = set(loading_info["missing_keys"]) - ({"score.weight"} if scores else set())
    if missing:  # transformers would go on with random numbers
        raise ModelError(f"the weights of {path} lack {min(missing)}: is it a whole causal language model?")
    unexpected = loading_info["unexpected_keys"]
    if unexpected and not scores:  # a reward model has no place for the language-model head of its base
        extra = f"{len(unexpected)} weights (first: {min(unexpected)})"
        print(f"{path} has {extra} that its config.json has no place for: they are left out", file=sys.stderr)
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if not all(end is None or type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        raise ModelError(f"generation_config.json of {path} says eos_token_id={ends!r}, and it has to be ids of tokens")
    if scores:
        head = getattr(model, "score", None)
        if type(head) is not nn.Linear or head.bias is not None:
            raise ModelError(f"{path} has no place for a scalar head `score`: is it a causal language model?")
        head.float()
        if loading_info["missing_keys"]:
            nn.init.zeros_(head.weight)
    return unmap(model.to(device))


def load_skeleton(path, tokenizer, args, scores=False):
    """The model without its weights (meta device), for checks that should not wait for them.  Raises ModelError.

    args: of the command line, where the script has them: trust_remote_code, max_length.
    """
    trust, max_length = getattr(args, "trust_remote_code", False), getattr(args, "max_length", 0)
    config = load_config(path, trust)
    check_positions(config, max_length, f"--max-length {max_length}", path)
    kind = _class_of(config, scores)
    with torch.device("meta"):
        build = partial(kind.from_config, config, trust_remote_code=trust)
        model = _loaded("model", path, build)
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if causal and not any(causal) and not prompt_sees_itself(config):
        raise not_causal(path)
    embedded = len(model.get_input_embeddings().weight)
    num_ids = max(tokenizer.get_vocab().values()) + 1  # not len(tokenizer): ids may have gaps
    if num_ids > embedded:
        raise ModelError(
            f"the model {path} knows {embedded} tokens and the tokenizer {num_ids}: they do not go together"
        )
    return model


def sees(config):
    """Whether a model of this config reads pictures beside text, as far as transformers knows."""
    return type(config) in AutoModelForImageTextToText._model_mapping


def _class_of(config, scores):
    """The class to load a model by."""
    known = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    if type(config) in known._model_mapping or not sees(config):
        return known
    return _scoring(AutoModelForImageTextToText._model_mapping[type(config)]) if scores else AutoModelForImageTextToText


def _scoring(kind):
    """A vision-language model with a scalar head in the place of its language-model head: transformers has no class
    for that.
    """

    class Scoring(kind):
        _tied_weights_keys = {}  # that head is tied to nothing

        def __init__(self, config):
            super().__init__(config)
            del self.lm_head
            self.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)

        def get_output_embeddings(self):
            return None

        @classmethod
        def from_config(cls, config, **_):
            return cls._from_config(config)

    # What names weights of older files anew goes by name and module; and a saved config.json has the name.
    Scoring.__name__, Scoring.__module__ = kind.__name__, kind.__module__
    return Scoring


def prompt_sees_itself(config):
    """Whether a prompt's tokens see each other and a response's only earlier ones (PaliGemma), which the model is told
    by `token_type_ids`, 0 and 1: without them it is not causal anywhere.
    """
    return config.model_type == "paligemma"


def not_causal(name):
    return ModelError(
        f"{name} is no causal language model, what it says of a token depends on later ones (an encoder, an "
        "encoder-decoder, or another model that sees both sides): name a decoder"
    )


def check_positions(config, tokens, reason, path):
    """Raise ModelError where a model has fewer positions than `tokens`; reason: what asks for so many, in words."""
    room = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    if tokens > room > 0:
        raise ModelError(f"{reason} is more than the {room} positions of the model {path}: make it smaller")


def load_config(path, trust_remote_code):
    """config.json of a causal language model whose weights are whole.  Raises ModelError."""
    load = partial(_from, AutoConfig, path, trust_remote_code=trust_remote_code)
    config = _loaded("model", path, load)
    if getattr(config, "is_encoder_decoder", False):
        raise not_causal(path)
    for part in (config, _loaded("model", path, config.get_text_config)):
        if settings := getattr(part, "quantization_config", None):
            is_dict = isinstance(settings, dict)
            method = settings.get("quant_method") if is_dict else getattr(settings, "quant_method", None)
            raise ModelError(
                f"the weights of {path} are quantised ({method or 'quantization_config'} in its config.json), which is "
                "not done here: name the model that they were made from"
            )
    return config


def _from(kind, path, weights=False, **options):
    """A tokenizer, config or model (`kind`) of a folder, or of what the hub has under that name.  Raises HubError."""
    place = hub_files.local(str(path), weights=weights)
    for file in Path(place).glob("*.safetensors") if weights else ():
        check_readable(file)
    return kind.from_pretrained(place, **options)


def _loaded(kind, path, load):
    """load(), a from_pretrained of transformers, with all that a foreign folder can make it raise as a ModelError.

    That is anything: tokenizers raises plain Exception, pickle and the checks of configs have errors of their own.
    """
    try:
        return load()
    except hub_files.HubError as error:
        raise ModelError(str(error)) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the {kind} {path} comes with code of its own: read it, and pass --trust-remote-code to run it"
            ) from None
        if reason := hub_files.unanswered(path):
            raise ModelError(f"no {kind} at {path}: {reason}") from None
        advice = "check the name; without a hub name a folder, a mirror in HF_ENDPOINT, or --hub modelscope"
        if type(error).__name__ == "SafetensorError":
            advice = "a file of weights there is cut off or damaged: copy or download it again"
        elif _exists(path):
            advice = "a model folder holds config.json, model.safetensors and the tokenizer's files"
        raise ModelError(f"no {kind} at {path} ({_first_sentence(error)}): {advice}") from None


def _exists(path):
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a path, or in a folder that is not to be entered
        return False


def save_whole(model, folder, state):
    """Write a model that was trained whole: its weights, {name: tensor of one type}, config and generation settings."""
    model.save_pretrained(folder, state_dict=state)
    model.config.dtype = next(iter(state.values())).dtype  # save_pretrained has written that of the live weights
    model.config.save_pretrained(folder)


def save_tokenizer(tokenizer, folder):
    """Write the tokenizer; and where a whole model stands in `folder`, let `generate` stop at the end of a turn too."""
    tokenizer.save_pretrained(folder)
    if (Path(folder) / "generation_config.json").exists():
        settings = GenerationConfig.from_pretrained(folder)
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        if turn_end(tokenizer) not in ends:
            settings.eos_token_id = [*(end for end in ends if end is not None), turn_end(tokenizer)]
            settings.save_pretrained(folder)


def enable_checkpointing(model, draws=True):
    """Recompute each block in backward instead of keeping its activations (non-reentrant).

    draws: whether a block draws random numbers, which have to be the same again.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.2x
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False, "preserve_rng_state": draws})


def _first_sentence(error):
    line, *next_lines = (str(error).strip() or type(error).__name__).split("\n")
    if next_lines and line.endswith(":"):
        line += f" {next_lines[0].strip()}"
    return re.split(r"\. (?=[A-Z])", line)[0].rstrip(".:")[:200]


def pad_unlike_ends(path, tokenizer, config):
    """Id of a token that ends no response, for padding in front of transformers' reward models.

    They read the score at the last token that is not padding: where that is the end-of-sequence, the one before it.
    """
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
    of_configs = [getattr(part, "eos_token_id", None) for part in (config, config.get_text_config())]
    for given in (*of_configs, _generation_ends(path)):
        ends |= set(given) if isinstance(given, list) else {given}
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    return next(token for token in (*special, *range(len(tokenizer))) if token is not None and token not in ends)


def _generation_ends(path):
    try:
        return _from(GenerationConfig, path).eos_token_id
    except Exception:  # not every folder has one, and some a broken one: the config's own ends count
        return None
