"""The cache of reference log-probs: the same run with and without it, and only the right file is ever used."""

import json

import pytest
import torch
from conftest import plain_logps, run_script, tiny_model
from safetensors.torch import load_file, save_file
from test_flags import write_world

import dpo_hf_run
import lora
from model_files import load_model, load_tokenizer
from packed_model import prepare_model
from packing import pack
from preference_data import load_pairs
from score_cache import cache_path, load_scores, pair_scores, save_scores, weights_sha256


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def train(world, tmp_path, capsys):
    """train(output folder, flags ...) -> (adapter bytes, losses, the log's line about the cache)."""

    def run(name, *words, model=None, dataset=None):
        data = ["--model", model or world / "model", "--dataset", dataset or world / "pairs.jsonl"]
        common = "--dtype fp32 --device cpu --eval-samples 4 --max-steps 3 --logging-steps 1 --learning-rate 1e-3"
        run_script([*data, *common.split(), "--report-to", "none", "--output-dir", tmp_path / name, *words])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("reference log-probs"))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [value for entry in map(json.loads, lines) for key, value in entry.items() if "loss" in key]
        return (tmp_path / name / "adapter_model.safetensors").read_bytes(), losses, line

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
    args = dpo_hf_run.get_args([])
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    online = []
    for step, (num_pairs, ranks) in enumerate(dpo_hf_run.epoch_plan(range(len(pairs)), 0, 42, 2, 4, 1)[:3]):
        optimizer.param_groups[0]["lr"] = 1e-3 * (3 - step) / 3
        total = 0
        for indices in ranks[0]:
            batch = pack([pairs[i] for i in indices])
            with torch.no_grad(), lora.use_adapter(model, None):
                ref_logps = torch.stack(model.packed_logps(batch), dim=1)
            batch_losses, _ = dpo_hf_run.pair_losses(model, batch, ref_logps, args)
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
    assert torch.equal(load_scores(path, (5, 2))[0], scores)
    assert load_scores(path, (4, 2))[0] is None
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no unfinished file stays"
    assert path == cache_path(tmp_path / "deep/er", "reference", pairs="b", weights="a")
    assert path != cache_path(tmp_path / "deep/er", "reference", pairs="a", weights="b")


def test_numbers_that_are_not_finite_are_not_kept(tmp_path):
    path, said = cache_path(tmp_path, "reference", weights="a"), []

    def scored(value):
        def score(indices):
            return torch.full((len(indices),), value), torch.tensor(indices, dtype=torch.float32)

        return pair_scores(path, 3, [[0, 2], [1]], score, torch.device("cpu"), said.append)

    assert scored(float("nan"))[:, 0].isnan().all()
    assert not path.exists()
    assert scored(2.0).tolist() == [[2, 0], [2, 1], [2, 2]]
    assert scored(7.0).tolist() == [[2, 0], [2, 1], [2, 2]], "kept, and not asked again"
    assert [line.split(" ")[0] for line in said] == ["computed", "computed", "read"]
