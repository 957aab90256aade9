"""Numbers that a frozen model gives to fixed data are constants: computed once, kept in one safetensors file, reused by
later epochs and runs.  The file is found by what the numbers depend on, so it can never be stale, only missing.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def weights_sha256(named_tensors):
    """sha256 over names, types, shapes and bytes of (name, tensor) pairs, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_path(folder, what, **depends_on):
    """Where the numbers `what` are kept; `depends_on` is everything that could change them (strings, numbers)."""
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"{what}-{key[:32]}.safetensors"


def load_scores(path, shape):
    """The cached tensor, or None; and a sentence for the log: (scores, sentence).

    A file that cannot be read, or whose numbers are not those that were written, is passed over.
    """
    if not path.exists():
        return None, f"computed now and kept in {path}"
    try:
        with safe_open(path, framework="pt") as file:
            scores, metadata = file.get_tensor("scores"), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        return None, f"{path} cannot be read ({error}): computed anew"
    if tuple(scores.shape) != tuple(shape) or metadata.get("sha256") != weights_sha256([("scores", scores)]):
        return None, f"{path} does not hold what was written there: computed anew"
    return scores, f"read from {path}"


def save_scores(path, scores):
    """Write the tensor with its checksum; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = scores.contiguous().cpu()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"scores": scores}, unfinished, metadata={"sha256": weights_sha256([("scores", scores)])})
    os.replace(unfinished, path)
