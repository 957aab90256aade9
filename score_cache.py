"""Numbers that a frozen model gives to fixed data are constants: computed once, kept in one safetensors file, reused by
later epochs and runs.  The file is found by what the numbers depend on, so it can never be stale, only missing.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from tensor_files import save_file


def weights_sha256(named_tensors, dtype=None):
    """sha256 over names, types, shapes and bytes of (name, tensor) pairs in the order of their names, cast to dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda pair: pair[0]):
        tensor = tensor if dtype is None else tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def base_sha256(model):
    """sha256 of a model's backbone without head and adapters, as rounded to bf16: the number type it was loaded in does
    not count, and a reward model and a language model on the same base agree."""
    backbone = model.base_model.state_dict().items()
    return weights_sha256(((name, tensor) for name, tensor in backbone if ".lora_" not in name), torch.bfloat16)


def frozen_sha256(model, adapter_state=None):
    """sha256 of what a model computes: its weights without its adapters, but for one {name: tensor}, and its config."""
    weights = [(name, tensor) for name, tensor in model.state_dict().items() if ".lora_" not in name]
    config = json.dumps(_settings(model.config.to_dict()), default=str)
    return hashlib.sha256((weights_sha256([*weights, *(adapter_state or {}).items()]) + config).encode()).hexdigest()


def _settings(config):
    """Of a config, in order, what changes numbers: a rope or an epsilon; not where a model is from or how it is run."""
    run = ("transformers_version", "architectures", "dtype", "use_cache")
    return {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in sorted(config.items(), key=str)
        if str(name) not in run and not str(name).startswith("_")
    }


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


def frozen_scores(folder, role, sha256, pairs_sha256, dtype, score, num_pairs, passes, device, say):
    """pair_scores by the frozen model with this role ("reference", "helpful", ...), kept in a file of the folder.

    They depend on its weights, the tokens and the number type, and on nothing else; they have to be finite.  dtype:
    any words for the number type: shards round to bf16 elsewhere than autocast does.
    """
    what = f"{role} {'log-probs' if role == 'reference' else 'scores'} of {num_pairs:,} pairs"
    path = cache_path(folder, role, weights=sha256, pairs=pairs_sha256, dtype=str(dtype))
    scores = pair_scores(path, num_pairs, passes, score, device, lambda how: say(f"{what}: {how}"))
    if not scores.isfinite().all():
        raise FloatingPointError(f"{what} are not all finite: nothing is saved; look for broken weights or data")
    return scores


@torch.no_grad()
def pair_scores(path, num_pairs, passes, score, device, say):
    """Two numbers for each pair by a frozen model, (num_pairs, 2) on the CPU: from the file `path`, or kept there now.

    passes: this rank's share of the pairs, in lists of indices.  score(indices) -> (chosen (B,), rejected (B,)) on
    `device`.  say(sentence) tells where the numbers are from.  Numbers that are not finite are not kept.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    scores, sentence = load_scores(path, (num_pairs, 2)) if rank == 0 else (None, "")
    say(sentence)
    found = torch.tensor(scores is not None, dtype=torch.float32)
    scores = torch.zeros(num_pairs, 2) if scores is None else scores
    if dist.is_initialized():
        dist.broadcast(found, src=0)
    if not found:
        scores = scores.to(device)
        for indices in tqdm(passes, desc=path.name.partition("-")[0], disable=rank > 0 or not sys.stderr.isatty()):
            scores[indices] = torch.stack(score(indices), dim=1).float()
    if dist.is_initialized():  # each rank has its share, or rank 0 all that was cached
        dist.all_reduce(scores)
    scores = scores.cpu()
    if rank == 0 and not found and scores.isfinite().all():
        save_scores(path, scores)
    return scores
