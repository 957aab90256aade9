"""Numbers that a frozen model gives to fixed data are constants: computed once, kept in one safetensors file, reused by
later epochs and runs.  The file is found by what the numbers depend on, so it can never be stale, only missing.  A run
asks for the pairs of its own updates and those held out; the rows of the others are NaN until a run needs them.
"""

import hashlib
import json
import math
import os
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.nn.functional import pad
from tqdm import tqdm

import distributed
from formats import written_files
from formats.tensor_files import save_file
from harness import locks
from packing import send


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
    not count, and a reward model and a language model on the same base agree.  Of one in 4 bits that of its source."""
    if hasattr(model, "source_sha256"):
        return model.source_sha256
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


def load_scores(path, num_pairs):
    """The cached (num_pairs, 2), NaN in rows that nobody has asked for yet, or None; and a sentence for the log.

    A file that cannot be read, or whose numbers are not those that were written, is passed over.
    """
    if not path.exists():
        return None, f"computed now and kept in {path}"
    try:
        with safe_open(path, framework="pt") as file:
            scores, metadata = file.get_tensor("scores").clone(), file.metadata() or {}  # not the file's own bytes
    except (SafetensorError, OSError) as error:
        return None, f"{path} cannot be read ({error}): computed anew"
    if tuple(scores.shape) != (num_pairs, 2) or metadata.get("sha256") != weights_sha256([("scores", scores)]):
        return None, f"{path} does not hold what was written there: computed anew"
    return scores, f"read from {path}"


def save_scores(path, scores):
    """Add rows to the file, (N, 2), NaN in those that are not known; returns all that it has now.

    A row that is there already stays: a run on it goes on with the numbers it began with, whoever else shares the file.
    The file appears whole or not at all; who shares the folder waits for the moment that this takes.
    """
    lock = path.with_name(".lock")
    locks.hold(lock, f"--cache-dir {path.parent}", waits=True)
    there, _ = load_scores(path, len(scores))
    scores = scores if there is None else torch.where(there.isnan(), scores, there)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({"scores": scores}, unfinished, metadata={"sha256": weights_sha256([("scores", scores)])})
        with suppress(FileNotFoundError):  # another machine, which does not know this process, took it for a dead one's
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        locks.release(lock)
    return scores


@torch.no_grad()
def pair_scores(path, num_pairs, needed, share, score, world, termination, say):
    """Two numbers for each pair by a frozen model, (num_pairs, 2) on the CPU: from the file `path`, or kept there now.

    needed: the indices of the pairs to know; other rows may be NaN.  share(indices): this rank's lists of them, as many
    on each rank.  score(indices) -> (chosen (B,), rejected (B,)) on the rank's device.  say(sentence) tells where the
    numbers are from.  Numbers that are not finite are not kept.
    """
    scores, sentence = None, ""
    if world.is_main:
        written_files.remove_drafts(path.parent, f".{path.name.partition('-')[0]}-")
        locks.clear(path.with_name(".lock"))
        scores, sentence = load_scores(path, num_pairs)
    scores = torch.full((num_pairs, 2), math.nan) if scores is None else scores
    if world.size > 1:
        dist.broadcast(scores, src=0)
    unknown = scores.isnan().any(1).tolist()
    missing = [index for index in needed if unknown[index]]
    if 0 < len(missing) < len(needed):
        sentence = f"{len(needed) - len(missing):,} {sentence}, {len(missing):,} computed now and kept there"
    say(sentence)
    new = torch.zeros(num_pairs, 3, device=world.device)  # the two numbers, and 1 where they are there
    for indices in tqdm(share(missing), desc=path.name.partition("-")[0], disable=not distributed.shows_bars(world)):
        rows = pad(torch.stack(score(indices), dim=1).float(), (0, 1), value=1.0)
        new.index_copy_(0, send(torch.tensor(indices, dtype=torch.long), world.device), rows)
        if distributed.on_any_rank(termination.asked, world):  # of all ranks after the same pass
            break
    new = distributed.all_reduce_sum(new, world).cpu()
    done = new[:, 2] > 0
    scores[done] = new[done, :2]
    if done.any() and scores[done].isfinite().all():
        scores = save_scores(path, scores) if world.is_main else scores
        if world.size > 1:
            dist.broadcast(scores, src=0)
    return scores
