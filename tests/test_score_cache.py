"""The cache of reference log-probs: the same run with and without it, and only the right file is ever used."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from processes import end_of, start
from runs import adapter_bytes, metrics_of, run_script
from safetensors.torch import load_file, save_file
from tiny_models import plain_logps, tiny_model

import lora
from distributed import World
from formats.model_files import load_model, load_tokenizer
from harness.score_cache import cache_path, load_scores, pair_scores, save_scores, weights_sha256
from packed_model import prepare_model
from packing import epoch_plan, pack
from preference_data import load_pairs


@pytest.fixture
def train(world, tmp_path, capsys):
    """train(output folder, flags ...) -> (adapter bytes, losses, the log's line about the cache)."""

    def run(name, *words, model=None, dataset=None):
        data = ["--model", model or world / "model", "--dataset", dataset or world / "pairs.jsonl"]
        common = "--dtype fp32 --device cpu --eval-samples 4 --max-steps 3 --logging-steps 1 --learning-rate 1e-3"
        run_script([*data, *common.split(), "--report-to", "none", "--output-dir", tmp_path / name, *words])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("reference log-probs"))
        losses = [value for entry in metrics_of(tmp_path / name) for key, value in entry.items() if "loss" in key]
        return adapter_bytes(tmp_path / name), losses, line

    return run


def test_a_later_run_reads_what_an_earlier_one_kept_and_is_the_same_run(train, tmp_path):
    shared = ["--cache-dir", tmp_path / "cache"]
    first, second = train("one", *shared), train("two", *shared)
    assert "computed now and kept in" in first[2] and "read from" in second[2]
    assert first[:2] == second[:2]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # By default it lies in the run's folder, and outlives the run that is replaced there.
    assert "computed now" in train("three")[2]
    assert "read from" in train("three", "--overwrite")[2]


@pytest.mark.parametrize(
    "changes",
    [["--seed", "7"], ["--lora-r", "4"], ["--beta", "0.3"], ["--batch-size", "3"], ["--max-steps", "1"]],
    ids=lambda words: words[0],
)
def test_what_does_not_touch_the_reference_reuses_it(train, tmp_path, changes):
    train("one", "--cache-dir", tmp_path / "cache")
    assert "read from" in train("two", "--cache-dir", tmp_path / "cache", *changes)[2]


@pytest.mark.parametrize("changes", [["--num-samples", "20"], ["--max-length", "7", "--max-prompt-length", "4"]])
def test_other_tokens_are_another_cache(train, tmp_path, changes):
    train("one", "--cache-dir", tmp_path / "cache")
    assert "computed now" in train("two", "--cache-dir", tmp_path / "cache", *changes)[2]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_model_adapter_or_number_type_is_another_cache(train, world, tmp_path):
    shared = ["--cache-dir", tmp_path / "cache"]
    adapter, _, _ = train("one", *shared)
    state = load_file(world / "model/model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    for path in (world / "model").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    name = next(key for key in state if "down_proj" in key)
    state[name][0, 0] += 1e-3  # one number in one matrix
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    assert "computed now" in train("two", *shared, model=other)[2]
    assert "computed now" in train("three", *shared, "--adapter", tmp_path / "one")[2]
    assert "computed now" in train("four", *shared, "--dtype", "bf16")[2]
    assert "read from" in train("five", *shared, "--ref-model-path", world / "model")[2], (
        "the same reference, loaded apart"
    )
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_cached_numbers_are_the_references_log_probs(train, world, tmp_path):
    train("one", "--cache-dir", tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    scores = load_file(path)["scores"]
    tokenizer = load_tokenizer(world / "model")
    pairs, _ = load_pairs(world / "pairs.jsonl", tokenizer, 512, 256)
    model = load_model(world / "model", torch.float32, "cpu")
    assert scores.shape == (len(pairs), 2)
    with torch.no_grad():
        for pair, row in zip(pairs, scores, strict=True):
            assert torch.stack(plain_logps(model, pack([pair])), 1)[0].tolist() == pytest.approx(row.tolist(), abs=1e-4)


def test_a_cached_run_is_the_run_that_asks_the_reference_each_time(train, world):
    """Losses of the script against a loop that scores the reference anew in every pass."""
    _, losses, _ = train("one", "--eval-samples", "0")
    tokenizer = load_tokenizer(world / "model")
    pairs, _ = load_pairs(world / "pairs.jsonl", tokenizer, 512, 256)
    model = load_model(world / "model", torch.float32, "cpu")
    torch.manual_seed(42)
    parameters = lora.add_adapter(model, "policy", 16, 32)
    prepare_model(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    online = []
    for step, (num_pairs, ranks) in enumerate(epoch_plan(range(len(pairs)), 0, 42, 2, 4, 1)[:3]):
        optimizer.param_groups[0]["lr"] = 1e-3 * (3 - step) / 3
        total = 0
        for indices in ranks[0]:
            batch = pack([pairs[i] for i in indices])
            with torch.no_grad(), lora.use_adapter(model, None):
                ref_logps = torch.stack(model.packed_logps(batch), dim=1)
            margins = torch.stack(model.packed_logps(batch), dim=1) - ref_logps
            batch_losses = -F.logsigmoid(0.1 * (margins[:, 0] - margins[:, 1]))
            (batch_losses.sum() / num_pairs).backward()
            total += batch_losses.sum().item() / num_pairs
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        online.append(total)
    assert losses[::2] == pytest.approx(online, abs=1e-5)


@pytest.mark.parametrize("damage", ["torn", "empty", "one bit", "another model's", "not ours"])
def test_a_damaged_or_foreign_file_is_computed_anew_and_says_so(train, tmp_path, damage):
    shared = ["--cache-dir", tmp_path / "cache"]
    first = train("one", *shared)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    if damage == "another model's":
        foreign = tmp_path / "foreign"
        train("other", "--cache-dir", foreign, "--num-samples", "20")
        (other,) = foreign.iterdir()
        path.write_bytes(other.read_bytes())
    elif damage == "not ours":
        save_file({"scores": torch.zeros(load_file(path)["scores"].shape)}, path)
    else:
        changed = {"torn": whole[:-9], "empty": b"", "one bit": whole[:-1] + bytes([whole[-1] ^ 1])}
        path.write_bytes(changed[damage])
    again = train("two", *shared)
    assert "computed anew" in again[2] and str(path) in again[2]
    assert again[:2] == first[:2]
    assert path.read_bytes() == whole, "the next run finds a good file"


def test_weights_hash_sees_every_bit_name_type_and_shape_and_no_order():
    model = tiny_model("qwen3")
    named = list(model.state_dict().items())
    number = weights_sha256(named)
    assert number == weights_sha256(reversed(named))
    changed = {name: tensor.clone() for name, tensor in named}
    changed["model.norm.weight"][3] += 1e-6
    others = [
        changed.items(),
        [(name.replace("layers.0", "layers.9"), tensor) for name, tensor in named],
        [(name, tensor.bfloat16()) for name, tensor in named],
        [(name, tensor.t() if tensor.ndim == 2 else tensor) for name, tensor in named],
        named[1:],
    ]
    assert len({number} | {weights_sha256(other) for other in others}) == 6


def test_scores_come_back_as_they_were_and_only_in_their_shape(tmp_path):
    path, scores = cache_path(tmp_path / "deep/er", "reference", weights="a", pairs="b"), torch.randn(5, 2)
    save_scores(path, scores)
    assert torch.equal(load_scores(path, 5)[0], scores)
    assert load_scores(path, 4)[0] is None
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no unfinished file stays"
    assert path == cache_path(tmp_path / "deep/er", "reference", pairs="b", weights="a")
    assert path != cache_path(tmp_path / "deep/er", "reference", pairs="a", weights="b")


def test_a_row_that_is_there_stays_and_others_come(tmp_path):
    """Two runs that share a folder: what one has begun with is what it goes on with."""
    path, nan = tmp_path / "reference-1.safetensors", float("nan")
    save_scores(path, torch.tensor([[1, 2], [nan, nan], [nan, nan]]))
    assert save_scores(path, torch.tensor([[9, 9], [3, 4], [nan, nan]]))[:2].tolist() == [[1, 2], [3, 4]]
    kept, said = load_scores(path, 3)
    assert kept[:2].tolist() == [[1, 2], [3, 4]] and kept[2].isnan().all() and said == f"read from {path}"


class Asked:
    """A checkpoints.Termination to which the signal comes while pass number `after` is scored."""

    def __init__(self, after=0):
        self.after, self.polls = after, 0

    @property
    def asked(self):
        self.polls += 1
        return signal.SIGINT * (self.polls == self.after)


def scored(path, needed, value=2.0, after=0):
    """(numbers, the pairs that were scored, what was said) of three pairs, one in a pass."""
    seen, said = [], []

    def score(indices):
        seen.extend(indices)
        return torch.full((len(indices),), value), torch.tensor(indices, dtype=torch.float32)

    share = lambda indices: [[index] for index in indices]  # noqa: E731
    world = World(0, 1, torch.device("cpu"))
    return pair_scores(path, 3, needed, share, score, world, Asked(after), said.append), seen, said


def test_numbers_that_are_not_finite_are_not_kept(tmp_path):
    path = cache_path(tmp_path, "reference", weights="a")
    assert scored(path, [0, 1, 2], float("nan"))[0][:, 0].isnan().all()
    assert not path.exists()
    scores, seen, said = scored(path, [0, 1, 2])
    assert (scores.tolist(), seen) == ([[2, 0], [2, 1], [2, 2]], [0, 1, 2]) and said[0].startswith("computed now")
    scores, seen, said = scored(path, [0, 1, 2], 7.0)
    assert (scores.tolist(), seen) == ([[2, 0], [2, 1], [2, 2]], []), "kept, and not asked again"
    assert said == [f"read from {path}"]


def test_only_what_is_needed_is_scored_and_what_is_missing_later(tmp_path):
    path = cache_path(tmp_path, "reference", weights="a")
    assert scored(path, [1])[1:] == ([1], [f"computed now and kept in {path}"])
    scores, seen, said = scored(path, [0, 1], 7.0)
    assert (scores[:2].tolist(), seen) == ([[7, 0], [2, 1]], [0]) and scores[2].isnan().all()
    assert said == [f"1 read from {path}, 1 computed now and kept there"]


def test_what_was_scored_before_a_signal_is_kept(tmp_path):
    path = cache_path(tmp_path, "reference", weights="a")
    assert scored(path, [0, 1, 2], after=2)[1] == [0, 1]
    assert scored(path, [0, 1, 2])[1] == [2]


def test_drafts_of_killed_processes_go(tmp_path):
    killed = start(["true"])
    end_of(killed)
    path = cache_path(tmp_path, "reference", weights="a")
    stays = [tmp_path / f".{path.name}.{os.getpid()}", tmp_path / f".{path.name}.md", tmp_path / f".mine.{killed.pid}"]
    for draft in [tmp_path / f".{path.name}.{killed.pid}", *stays[:2], stays[2]]:
        draft.touch()
    load = scored(path, [0])[1]
    left = {file.name for file in tmp_path.iterdir()}
    assert load == [0] and left == {path.name, stays[1].name, stays[2].name}


def test_a_shorter_run_scores_the_pairs_of_its_updates_and_a_longer_one_the_rest(train, world, tmp_path, monkeypatch):
    shared = ["--cache-dir", tmp_path / "cache", "--batch-size", "2", "--gradient-accumulation-steps", "2"]
    _, one, said = train("one", *shared, "--max-steps", "1")
    assert said.startswith("reference log-probs of 8 pairs: computed now"), "4 of the update and 4 held out"
    (path,) = (tmp_path / "cache").iterdir()
    first = load_file(path)["scores"]
    assert (~first.isnan()).sum(0).tolist() == [8, 8]
    _, two, said = train("two", *shared, "--max-steps", "3")
    assert said.startswith("reference log-probs of 16 pairs: 8 read from") and ", 8 computed now" in said
    second = load_file(path)["scores"]
    assert torch.equal(second[~first.isnan()], first[~first.isnan()])
    _, cold, _ = train("cold", *shared[2:], "--max-steps", "3")
    assert two == pytest.approx(cold, abs=1e-6)
