"""Models and tokenizers from a folder or a hub, with every failure as one sentence."""

import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging


class ModelError(ValueError):
    """A model that cannot be loaded or used: one sentence for the user."""


NOT_LOADED = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)  # what from_pretrained raises


def load_tokenizer(path, trust_remote_code=False):
    """Tokenizer of a folder or hub id.  Raises ModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except NOT_LOADED as error:
        raise _not_loaded("tokenizer", path, error) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {path} has no end-of-sequence token: set eos_token in tokenizer_config.json"
        )
    return tokenizer


def load_model(path, dtype, device, trust_remote_code=False, scores=False):
    """Causal language model of a folder or hub id in `dtype` on `device`, in eval mode.  Raises ModelError.

    scores: a reward model instead, whose head `score` (1, H), fp32, is the saved one or, on a base, zero: the first
    loss is then ln 2, and no draw decides what the score begins with.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    if scores:  # a warning about the head, which is new on purpose
        transformers_logging.set_verbosity_error()
    kind, options = (AutoModelForSequenceClassification, {"num_labels": 1}) if scores else (AutoModelForCausalLM, {})
    try:
        model, found = kind.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    except NOT_LOADED as error:
        raise _not_loaded("model", path, error) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = set(found["missing_keys"]) - ({"score.weight"} if scores else set())
    if missing:  # transformers would go on with random numbers
        raise ModelError(f"the weights of {path} lack {min(missing)}: is it a whole causal language model?")
    if scores:
        head = getattr(model, "score", None)
        if type(head) is not nn.Linear or head.bias is not None:
            raise ModelError(f"{path} has no place for a scalar head `score`: is it a causal language model?")
        head.float()
        if found["missing_keys"]:
            nn.init.zeros_(head.weight)
    return model.to(device)


def load_skeleton(path, tokenizer, trust_remote_code=False, scores=False):
    """The model without its weights (meta device), for checks that should not wait for them.  Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        both_sides = config.is_encoder_decoder  # a decoder's half sets it to False
        with torch.device("meta"):
            kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
            model = kind.from_config(config, trust_remote_code=trust_remote_code)
    except NOT_LOADED as error:
        raise _not_loaded("model", path, error) from None
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if both_sides or (causal and not any(causal)):
        raise not_causal(path)
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        known = len(model.get_input_embeddings().weight)
        raise ModelError(
            f"the model {path} knows {known} tokens and the tokenizer {len(tokenizer)}: they do not go together"
        )
    return model


def not_causal(name):
    return ModelError(
        f"{name} is no causal language model, what it says of a token depends on later ones (an encoder, an "
        "encoder-decoder, or another model that sees both sides): name a decoder"
    )


def _not_loaded(what, path, error):
    advice = "check the name; without a hub name a folder, or a mirror in HF_ENDPOINT"
    if Path(path).exists():
        advice = "a model folder holds config.json, model.safetensors and the tokenizer's files"
    return ModelError(f"no {what} at {path} ({_first_line(error)}): {advice}")


def save_whole(model, folder, state):
    """Write a model that was trained whole: its weights, {name: tensor of one type}, config and generation settings."""
    model.save_pretrained(folder, state_dict=state)
    model.config.dtype = next(iter(state.values())).dtype  # save_pretrained has written that of the live weights
    model.config.save_pretrained(folder)


def enable_checkpointing(model):
    """Recompute each block in backward instead of keeping its activations (non-reentrant)."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.2x
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _first_line(error):
    return str(error).strip().split("\n")[0][:200]


def pad_unlike_ends(path, tokenizer, config):
    """Id of a token that ends no response, for padding in front of transformers' reward models.

    They read the score at the last token that is not padding: where that is the end-of-sequence, the one before it.
    """
    ends = {tokenizer.eos_token_id}
    for given in (config.eos_token_id, config.get_text_config().eos_token_id, _generation_ends(path)):
        ends |= set(given) if isinstance(given, list) else {given}
    known = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    return next(token for token in (*known, *range(len(tokenizer))) if token is not None and token not in ends)


def _generation_ends(path):
    try:
        return GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # not every folder has one
        return None
