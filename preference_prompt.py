"""Preference prompts: a text that is put into a prompt, or a soft prompt, n learned vectors that stand in it.

    with_text(prompt, "Please be brief.", "system")      text level: a message, or behind a plain string
    with_virtual_tokens(prompt_ids, n, "prefix")         token level: ids -1, -2, ..., -n, which no tokenizer has
    use_soft_prompt(model, vectors)                      from then on id -1 - k means vectors[k] to the model

A virtual token is a place like any other to packing, positions, masks and log-probs: only the embedding layer knows
what stands there.  The vectors replace what that layer returns, after any scaling inside it (Gemma's): a soft prompt
that is `get_input_embeddings()(ids)` of a text is that text.

Files: PEFT's PROMPT_TUNING folder, safetensors, and `.pt` files, of which tensors are read and nothing is run.
"""

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from formats import written_files
from formats.json_files import read_object
from formats.model_files import check_positions
from formats.tensor_files import load_file, save_file
from formats.user_errors import UserError

VECTOR_POSITIONS = "prefix", "before-response"
KEYS = "prompt_embeddings", "embeddings", "weight"  # where a file may hold the vectors


class PromptError(UserError):
    """A preference prompt that cannot be used: one sentence for the user."""


def with_text(prompt, text, position="system"):
    """The prompt with the preference in it; the prompt itself where the text is empty.

    Messages: as (the end of) a system message, or behind the words of the last user.  A string: prompt + " " + text.
    """
    if not text:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt} {text}"
    if position == "system" and prompt[0]["role"] != "system":
        return [{"role": "system", "content": text}, *prompt]
    role = position if position == "system" else "user"
    places = [place for place, message in enumerate(prompt) if message["role"] == role]
    if not places:
        raise PromptError(
            "a row has no message of a user to put the preference behind: use --preference-position system"
        )
    place, apart = places[-1], "\n" if position == "system" else " "
    content = prompt[place]["content"] + apart + text  # TypeError where it is no string
    return [*prompt[:place], prompt[place] | {"content": content}, *prompt[place + 1 :]]


def with_virtual_tokens(prompt_ids, num_vectors, position):
    """Prompt ids with the virtual tokens -1, -2, ..., -n before all of them or behind all of them."""
    virtual = [-1 - k for k in range(num_vectors)]
    return virtual + prompt_ids if position == "prefix" else prompt_ids + virtual


def with_vectors(pairs, num_vectors, position):
    """The pairs with virtual tokens in their prompts.  Raises PromptError for one with a picture: a processor makes its
    ids anew for each pass, without them.
    """
    seeing = next((pair.pictures for pair in pairs if pair.pictures), None)
    if seeing:
        raise PromptError(
            f"{seeing.where} has a picture, and a soft prompt goes with text alone: leave such rows out, or say the "
            "preference in words with --preference-text"
        )
    return [pair._replace(prompt_ids=with_virtual_tokens(pair.prompt_ids, num_vectors, position)) for pair in pairs]


def use_soft_prompt(model, vectors):
    """Let token id -1 - k mean vectors[k], (n, D), in every later pass; the gradient reaches `vectors`.

    The embedding layer looks up token 0 there and its result is replaced, so its own weight gets no gradient from it.
    Returns a function that takes the soft prompt off again.
    """
    ids = []

    def look_up(module, args):
        ids[:] = args
        return (args[0].clamp(min=0), *args[1:])

    def replace(module, args, states):  # (..., T, D)
        own = vectors[(-1 - ids[0]).clamp(min=0)]  # at every place: to choose places would wait for a GPU
        return torch.where((ids[0] < 0)[..., None], own.to(states.dtype), states)

    embedding = model.get_input_embeddings()
    hooks = embedding.register_forward_pre_hook(look_up), embedding.register_forward_hook(replace)
    return lambda: [hook.remove() for hook in hooks]


def check_room(config, pairs, path):
    """Raise model_files.ModelError where pairs with a preference in them are longer than a model has positions."""
    longest = max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected, *_ in pairs)
    check_positions(config, longest, f"a pair of {longest} tokens with the preference", path)


# -- files ---------------------------------------------------------------------------------------------------------


def read_soft_prompt(path, width):
    """(vectors (n, width) fp32, the position they were trained for or None) of a file or a PEFT folder.

    A file holds a tensor (n, D) or (D,), or one under the name prompt_embeddings, embeddings or weight.
    Raises PromptError for what is missing, is no such file, holds code, or does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise PromptError(f"there is no soft prompt {path}: learn_prompt.py makes one")
    files = [path / name for name in written_files.ADAPTER] if path.is_dir() else [path]
    if damage := written_files.damage(files[0].parent, *(file.name for file in files)):
        raise PromptError(damage)
    is_safetensors = path.is_dir() or path.suffix == ".safetensors"
    tensor, position = _read_safetensors(path) if is_safetensors else _read_pt(path)
    if isinstance(tensor, dict):
        content = tensor
        name = next((key for key in KEYS if isinstance(content.get(key), torch.Tensor)), None)
        if name is None:
            names = ", ".join(map(str, content)) or "nothing"
            raise PromptError(f"{path} holds {names}, and none of {', '.join(KEYS)}")
        tensor = content[name]
    is_tensor = isinstance(tensor, torch.Tensor)
    if not is_tensor or tensor.ndim not in (1, 2) or not tensor.is_floating_point():
        kind = f"{tensor.dtype} {tuple(tensor.shape)}" if is_tensor else type(tensor).__name__
        raise PromptError(f"{path} holds {kind}: a soft prompt is n vectors of numbers, (n, {width})")
    vectors = tensor.detach().float()
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.shape[1] != width or not len(vectors):
        size = f"{len(vectors)} vectors of width {vectors.shape[1]}"
        raise PromptError(f"{path} holds {size}, and embeddings here have {width}: learn the soft prompt on this model")
    if not vectors.isfinite().all():
        raise PromptError(f"{path} holds vectors that are not finite: learn it again with a smaller --learning-rate")
    return vectors, position if position in VECTOR_POSITIONS else None


def _read_safetensors(path):
    """({name: tensor}, position or None) of a file or of a PEFT folder."""
    file = path
    if path.is_dir():
        file = path / "adapter_model.safetensors"
        try:
            kind = read_object(path / "adapter_config.json").get("peft_type")
        except (OSError, ValueError) as error:
            raise PromptError(f"{path} is no folder of a soft prompt (adapter_config.json: {error})") from None
        if kind != "PROMPT_TUNING":
            raise PromptError(f"{path} holds an adapter of the type {kind}, and a soft prompt is PROMPT_TUNING")
    try:
        with safe_open(file, "pt") as tensors:
            position = (tensors.metadata() or {}).get("preference_position", "prefix" if path.is_dir() else None)
        return load_file(file), position
    except (OSError, SafetensorError) as error:
        raise PromptError(f"{file} cannot be read as safetensors ({error}): write it again") from None


def _read_pt(path):
    """(what a .pt file holds, position or None).  Unpickles tensors and plain containers alone, and runs nothing."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise PromptError(
            f"{path} holds more than tensors and was not run ({reason}): save the tensor alone, as safetensors"
        ) from None
    except Exception as error:  # a pickle with a changed bit can raise anything
        raise PromptError(f"{path} cannot be read as a .pt file ({' '.join(str(error).split())[:200]})") from None
    return content, content.get("preference_position") if isinstance(content, dict) else None


def save_soft_prompt(vectors, folder, base_model, position, text=""):
    """Write vectors (n, D) into `folder`: PEFT's PROMPT_TUNING files, and prompt_embeddings.pt, (n, D) under that name.

    PEFT puts virtual tokens before everything and knows no other place: with `before-response` its model is not the
    one that was trained.  Both files say the place, which is read back.
    """
    folder, vectors = Path(folder), vectors.detach().float().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"preference_position": position}
    # One entry and no `format: pt` beside it, which PEFT does not ask for: safetensors writes them in a random order.
    save_file({"prompt_embeddings": vectors}, folder / "adapter_model.safetensors", metadata=metadata)
    torch.save({"prompt_embeddings": vectors} | metadata, folder / "prompt_embeddings.pt")
    config = {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(vectors),
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",  # of PEFT's own training: the vectors are in the file
        "task_type": "CAUSAL_LM",
        "token_dim": vectors.shape[1],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
