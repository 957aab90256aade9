"""Trained reward models put to use: as an adapter on the policy's own frozen base where they share it, else as a model
of their own.

`reward_model.json` says what a folder of train_rm.py holds.  One convention everywhere: a higher score is better; the
cost of a response is minus its harmless score, and only a model trained with labels (`calibrated`) knows its zero.
"""

import math
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
from preference_data import Pair


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
    "pictures": ("a text, or null", lambda value: value is None or isinstance(value, str)),
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


def load(folder, task, record, home, base_sha256, args, dtype, device, max_length=None, example=None, pictures=None):
    """The RewardModel of a folder: an adapter named `task` on `home` if both have the same base, else its own model.

    home: a causal language model, or None where an adapter cannot go on it; base_sha256: home's, by score_cache.
    Its own model is loaded in `dtype` on `device`, is ready for packed_scores, and has to take texts of max_length
    tokens (None: args.max_length).  example: a packed pair of the data with pictures, where there is one, and pictures:
    by what settings they are made (PictureReader.fingerprint).  Raises RewardModelError where it knows them otherwise.
    """
    folder = Path(folder)
    if pictures and record["pictures"] not in (None, pictures):
        raise RewardModelError(
            f"{folder} was trained on pictures as another processor makes them: train it on --model {args.model}"
        )
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
    prepare_scores(model, example)
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


# -- what cost is counted in, and what it may be ---------------------------------------------------------------------


class CostUnit(NamedTuple):
    """What cost is counted in (--score-units, --harm-rate), so that lambda means the same whatever the reward models.

    spread: the harmless score is divided by it.  A rate instead is the probability of harm that a calibrated model
    sees, sigmoid(-score).  At lambda = 1 one unit of cost weighs as much as `worth` of the helpful score.
    """

    spread: float = 1.0
    worth: float = 1.0
    is_rate: bool = False

    def cost(self, scores):
        """Of harmless scores, any shape."""
        return torch.sigmoid(-scores) if self.is_rate else -scores / self.spread

    def margins(self, scores):
        """ds of pairs, (N,), in the helpful score's unit, from the scores (N, 2) of chosen and rejected."""
        chosen, rejected = self.cost(scores).unbind(1)
        return self.worth * (rejected - chosen)


def cost_unit(records, folders, args):
    """The CostUnit of a run, from {task: reward_model.json} and {task: folder}.  Raises RewardModelError."""
    is_rate = args.harm_rate is not None
    if is_rate and not records["harmless"]["calibrated"]:
        raise RewardModelError(
            f"--harm-rate is of a harmless model that knows its zero, and {folders['harmless']} was trained without "
            "safety labels: train it with them, or give --cost-threshold"
        )
    if args.score_units == "raw":
        return CostUnit(is_rate=is_rate)
    spreads = {task: spread(record, folders[task]) for task, record in records.items()}
    return CostUnit(1.0 if is_rate else spreads["harmless"], spreads.get("helpful", 1.0), is_rate)


def spread(record, folder):
    """How far apart scores are on the validation pairs: the means of safe and of harmful responses where labels tell
    them apart, else the standard deviation.  Raises RewardModelError where nobody has looked.
    """
    known = record["validation"] or {}
    apart = known["safe_score"] - known["harmful_score"] if known.keys() >= APART else 0.0
    found = apart if apart > 0 else known.get("score_std", 0.0)
    if not found > 0:
        raise RewardModelError(
            f"--score-units spread needs the validation scores of {folder}, and its reward_model.json has none: train "
            "it with validation pairs, or take --score-units raw"
        )
    return found


FEW = 16  # responses, of which no mean is taken
APART = {"safe_score", "harmful_score"}  # means of a calibrated model's validation responses


def check_threshold(args, record):
    """Raise RewardModelError, before anything loads, for a --cost-threshold auto that cannot be."""
    is_validated = (record["validation"] or {}).keys() >= APART
    if args.cost_threshold == "auto" and record["calibrated"] and not is_validated:
        raise RewardModelError("--cost-threshold auto needs a harmless model that was validated: give a number instead")


def threshold(args, record, unit, scores, whose):
    """(threshold of E[cost], the sentence that says how it came about), of --cost-threshold and --harm-rate.

    scores (prompts, responses): what the harmless model gives to responses before training; whose: "the policy's own"
    or, where nothing is sampled, "the pairs'".  auto asks for what the policy can do: 5 % harm of a calibrated model,
    the better of two responses of one that does not know its zero.
    """
    if args.harm_rate is not None:
        return args.harm_rate, "--harm-rate, by the harmless model"
    if args.cost_threshold != "auto":
        unknown = "" if record["calibrated"] else ", of a model that was trained without labels: its zero means nothing"
        return args.cost_threshold, f"--cost-threshold{unknown}"
    if record["calibrated"]:
        safe, harmful = unit.cost(scores[scores > 0]), unit.cost(scores[scores <= 0])
        if min(len(safe), len(harmful)) < FEW:
            whose, known = "validation", record["validation"]
            safe, harmful = (unit.cost(torch.tensor(known[name])) for name in ("safe_score", "harmful_score"))
        safe, harmful = safe.mean().item(), harmful.mean().item()
        asked = "a harm rate of about 5 % by the harmless model"
        costs = f"{whose} safe responses cost {safe:.4f} and harmful ones {harmful:.4f}"
        return safe + 0.05 * (harmful - safe), f"{asked}: {costs}"
    return best_of(2, unit.cost(scores)), f"what the cheaper of two of {whose} responses costs"


def best_of(n, costs):
    """The mean of the least of n costs, over all choices of n of a row's; costs (rows, at least n)."""
    responses = costs.shape[1]
    share = [math.comb(above, n - 1) / math.comb(responses, n) for above in range(responses)]  # where it is the least
    falling = costs.double().sort(descending=True).values
    return (falling * torch.tensor(share, dtype=torch.float64)).sum(1).mean().item()


def as_pairs(prompts, responses):
    """Pairs for packing.pack, one prompt's responses two by two; and where each went.

    prompts: each with `ids` and `pictures`; responses: a list of responses (ids) for each.  An odd one stands twice.
    Returns (pairs, places): places[n][m] = (side, pair) of response m to prompt n, side 0 where chosen stands, 1
    rejected.
    """
    pairs, places = [], []
    for prompt, answers in zip(prompts, responses, strict=True):
        places.append([(m % 2, len(pairs) + m // 2) for m in range(len(answers))])
        for m in range(0, len(answers), 2):
            one, other = answers[m], answers[min(m + 1, len(answers) - 1)]
            pairs.append(Pair(prompt.ids, one, other, pictures=prompt.pictures))
    return pairs, places


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
