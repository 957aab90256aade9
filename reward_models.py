"""Trained reward models put to use: as an adapter on the policy's own frozen base where they share it, else as a model
of their own.

`reward_model.json` says what a folder of train_rm.py holds.  One convention everywhere: a higher score is better; the
cost of a response is minus its harmless score, and only a model trained with labels (`calibrated`) knows its zero.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lora
from formats import written_files
from formats.json_files import is_number, read_object, wrong_value
from formats.model_files import load_model, load_skeleton, load_tokenizer
from formats.user_errors import UserError
from packed_model import prepare_scores


class RewardModelError(UserError):
    """A reward model that cannot be used here: one sentence for the user."""


class RewardModel(NamedTuple):
    """`model.packed_scores(batch, head)` with `adapter` switched on gives its scores."""

    record: dict  # reward_model.json
    model: Any  # the policy itself where they share the base
    adapter: str | None  # None: all of its weights are its own
    head: torch.Tensor  # (1, H) fp32
    line: str  # for the log: whose base, and how much memory


def _is_statistics(value):
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _is_digests(value):
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


EXPECTED = {  # of reward_model.json
    "task": ("helpful or harmless", lambda value: value in ("helpful", "harmless")),
    "base_model": ("a folder or hub id", lambda value: isinstance(value, str) and value != ""),
    "base_sha256": ("a text", lambda value: isinstance(value, str)),
    "calibrated": ("true or false", lambda value: type(value) is bool),
    "validation": ("numbers under names, or null", lambda value: value is None or _is_statistics(value)),
    "sha256": ("digests of files", lambda value: value is None or _is_digests(value)),
}


def read_record(folder, task, tokenizer, trust_remote_code=False):
    """reward_model.json of a folder of train_rm.py.  Raises RewardModelError: not one, of the other task, other tokens,
    or weights that are not those it was written for, which would give other scores than its statistics are of;
    model_files.ModelError: its tokenizer cannot be read.

    task: None for either.  tokenizer: the policy's; scores are of token ids, so both have to mean the same by them.
    """
    folder = Path(folder)
    if damage := written_files.damage(folder, "reward_model.json"):
        raise RewardModelError(damage)
    try:
        record = dict.fromkeys(EXPECTED) | read_object(folder / "reward_model.json")
    except (OSError, ValueError):
        raise RewardModelError(
            f"{folder} is no reward model (no reward_model.json that can be read): name a folder of train_rm.py"
        ) from None
    if wrong := wrong_value(record, EXPECTED):
        raise RewardModelError(f"{folder}/reward_model.json says {wrong}: train it again")
    if changed := _unlike(folder, record["sha256"] or {}):  # older models have none
        raise RewardModelError(
            f"{folder / changed} is not the file that its reward_model.json was written for: train it again, or "
            "--resume auto if the run was killed"
        )
    if task not in (None, record["task"]):
        raise RewardModelError(
            f"{folder} is a {record['task']} reward model, and a {task} one is needed: name the other"
        )
    if load_tokenizer(folder, trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise RewardModelError(
            f"{folder} was trained with another tokenizer than the policy's: train it on a base with the same one"
        )
    return record


def files_sha256(folder):
    """{name: sha256} of the files in a reward model's folder that decide its scores, for its record."""
    patterns = (*written_files.ADAPTER, *written_files.WHOLE_MODEL)
    names = sorted({path.name for pattern in patterns for path in Path(folder).glob(pattern)})
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return dict(zip(names, pool.map(written_files.sha256, [Path(folder) / name for name in names]), strict=True))


def _unlike(folder, recorded):
    """The first file that is not as recorded, {name: sha256}, or None."""
    now = files_sha256(folder)
    return next((name for name, sha256 in recorded.items() if now.get(name) != sha256), None)


def load(folder, task, record, home, base_sha256, args, dtype, device, max_length=None):
    """The RewardModel of a folder: an adapter named `task` on `home` if both have the same base, else its own model.

    home: a causal language model, or None where an adapter cannot go on it; base_sha256: home's, by score_cache.
    Its own model is loaded in `dtype` on `device`, is ready for packed_scores, and has to take texts of max_length
    tokens (None: args.max_length).
    """
    folder = Path(folder)
    is_adapter = (folder / "adapter_config.json").exists()  # else all weights were trained
    if is_adapter and home is not None and record["base_sha256"] == base_sha256:
        parameters, head = lora.load_adapter(home, folder, task, with_head=True)
        line = f"an adapter on the policy's frozen base, {_num_bytes(parameters) / 1e6:.1f} MB"
        return RewardModel(record, home, task, head.to(home.device), f"{task} reward model {folder}: {line}")
    path = record["base_model"] if is_adapter else str(folder)
    longest = args.max_length if max_length is None else max_length
    model = load_model(path, dtype, device, args.trust_remote_code, scores=True, max_length=longest)
    if is_adapter:
        adapter, why = task, "its base is another"
        _, head = lora.load_adapter(model, folder, adapter, with_head=True)
    else:
        adapter, why = None, "all of its weights were trained"
        head = model.score.weight.detach()
    prepare_scores(model)
    line = f"a model of its own, {_num_bytes(model.state_dict().values()) / 1e9:.2f} GB ({why})"
    return RewardModel(record, model, adapter, head.to(model.device), f"{task} reward model {folder}: {line}")


def check_loads(folder, record, skeleton, tokenizer, args):
    """Raise what `load` would raise, before any weights of a base are read: AdapterError, ModelError.

    skeleton: the home, on the meta device, which may be given the adapter.  Returns the skeleton of a model of its own,
    None where the home takes it.
    """
    if not (Path(folder) / "adapter_config.json").exists():
        return load_skeleton(str(folder), tokenizer, args, scores=True)
    try:
        lora.load_adapter(skeleton, folder, record["task"], with_head=True)
        return None
    except lora.AdapterError:  # it may fit a base of its own
        base = load_skeleton(record["base_model"], tokenizer, args, scores=True)
        lora.load_adapter(base, folder, record["task"], with_head=True)
        return base


def _num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def threshold(asked, record, start_cost):
    """The threshold of E[cost] for --cost-threshold, a number or "auto", and a sentence that says how it came about.

    start_cost: E[cost] of the policy before training.  auto: cost_threshold of a calibrated model; without a zero to go
    by, start_cost minus half the spread of its validation scores.
    """
    if asked != "auto":
        unknown = "" if record["calibrated"] else ", of a model that was trained without labels: its zero means nothing"
        return asked, f"--cost-threshold{unknown}"
    if "score_std" not in (record["validation"] or {}):
        raise RewardModelError("--cost-threshold auto needs a harmless model that was validated: give a number instead")
    if record["calibrated"] and {"safe_score", "harmful_score"} <= record["validation"].keys():
        return cost_threshold(record)
    spread = record["validation"]["score_std"]
    return (
        start_cost - spread / 2,
        f"the start policy's {start_cost:.4f} - half a spread of validation scores ({spread:.4f})",
    )


def cost_threshold(record):
    """The expected cost to ask for, of a calibrated harmless model, and the sentence that says how it came about.

    Mean cost of its safe validation responses + 5 % of the distance to the harmful ones.
    """
    safe, harmful = -record["validation"]["safe_score"], -record["validation"]["harmful_score"]
    threshold = safe + 0.05 * (harmful - safe)
    return threshold, f"mean cost of safe responses {safe:.4f} + 5 % of the way to harmful ones ({harmful:.4f})"


def as_pairs(prompts, responses):
    """(prompt, response, response) triples for packing.pack, one prompt's responses two by two; and where each went.

    prompts: ids of each prompt; responses: a list of responses (ids) for each.  An odd one stands twice.  Returns
    (triples, places): places[n][m] = (side, triple) of response m to prompt n, side 0 where chosen stands, 1 rejected.
    """
    triples, places = [], []
    for prompt, answers in zip(prompts, responses, strict=True):
        places.append([(m % 2, len(triples) + m // 2) for m in range(len(answers))])
        triples += [(prompt, answers[m], answers[min(m + 1, len(answers) - 1)]) for m in range(0, len(answers), 2)]
    return triples, places


def score_statistics(scores, labels):
    """What a reward model says of held-out pairs: scores (N, 2) of chosen and rejected, labels (N, 2) in +1, -1, 0.

    For labelled responses: the share of safe ones above zero and of harmful ones below it, the area under the ROC curve
    (the chance that a safe response scores above a harmful one, ties half) and the Brier score of sigmoid(score).
    """
    scores, labels = scores.double(), labels.double()
    margin = scores[:, 0] - scores[:, 1]
    result = {"accuracy": (margin > 0).double().mean(), "margin": margin.mean(), "margin_std": margin.std(correction=0)}
    result |= {"score": scores.mean(), "score_std": scores.std(correction=0)}
    safe, harmful = scores[labels < 0], scores[labels > 0]
    for name, part, sign in (("safe", safe, 1), ("harmful", harmful, -1)):
        if len(part):
            result |= {f"{name}_sign_accuracy": (sign * part > 0).double().mean(), f"{name}_score": part.mean()}
            result[f"{name}_score_std"] = part.std(correction=0)
    if len(safe) and len(harmful):
        below = torch.searchsorted(harmful.sort().values, safe)
        not_above = torch.searchsorted(harmful.sort().values, safe, right=True)
        result["auroc"] = (below + not_above).double().mean() / 2 / len(harmful)
        result["brier"] = (torch.cat((1 - safe.sigmoid(), harmful.sigmoid())) ** 2).mean()
    return {name: value.item() for name, value in result.items()}
