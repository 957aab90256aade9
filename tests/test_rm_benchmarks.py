"""benchmarks/rm_vs_trl.py on a tiny model: both do the same work; nothing is asserted about speed.  And the pieces of
benchmarks/reward_models_on_hh.py, by numbers worked out by hand.
"""

import contextlib
import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from runs import run_script
from transformers import AutoTokenizer
from worlds import write_rows

import train_rm
from packing import pack
from preference_data import Pair, load_pairs

sys.path.insert(0, str(ROOT / "benchmarks"))
import contenders
import reward_models_on_hh as study
import rm_vs_trl

CONTENDERS = ["ours-fp32", "trl-fp32"]
UPDATES, WARMUP, BATCH, ACCUMULATION = 2, 4, 2, 2  # the third update is the first that moves lora_A
PAIRS = (UPDATES + WARMUP) * BATCH * ACCUMULATION


@pytest.fixture(scope="module")
def yardstick():
    """(datasets, trl)."""
    reason = "yardstick {} not installed".format
    datasets, trl, *_ = (pytest.importorskip(n, reason=reason(n)) for n in ("datasets", "trl", "peft", "accelerate"))
    return datasets, trl


# -- rm_vs_trl.py ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(yardstick, world, tmp_path_factory):
    """(what --json wrote, what was printed)."""
    file = tmp_path_factory.mktemp("benchmark") / "result.json"
    words = ["--model", world / "model", "--dataset", world / "pairs.jsonl", "--updates", UPDATES, "--warmup", WARMUP]
    words += ["--batch-size", BATCH, "--gradient-accumulation-steps", ACCUMULATION, "--json", file]
    words = [*map(str, words), "--contenders", *CONTENDERS]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["rm_vs_trl.py", *words])  # what each contender's own process is started with
        for name, value in dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1").items():
            patch.setenv(name, value)
        contenders.compare(rm_vs_trl.BENCHMARK, contenders.get_args(rm_vs_trl.BENCHMARK, rm_vs_trl.__doc__, 4, 2))
    return json.loads(file.read_text()), printed.getvalue()


@pytest.fixture(scope="module")
def pairs(world):
    return load_pairs(world / "pairs.jsonl", AutoTokenizer.from_pretrained(world / "model"), 512, 256)[0][:PAIRS]


def test_both_train_the_same_weights_on_the_same_tokens(measured, world, pairs):
    runs = measured[0]["runs"]
    assert list(runs) == CONTENDERS
    ours, theirs = (runs[name][0] for name in CONTENDERS)
    prompts, responses = (sum(len(ids) for pair in pairs for ids in pair[part]) for part in (slice(1), slice(1, 3)))
    assert ours["tokens"] == prompts + responses
    assert theirs["tokens"] == 2 * prompts + responses
    assert theirs["data"] != ours["data"]  # of both sides whole, in the order of the plan, and of the pairs of the file
    assert ours["updates"] == theirs["updates"] == PAIRS / BATCH / ACCUMULATION
    assert len(ours["times"]) == len(theirs["times"]) == UPDATES
    config = json.loads((world / "model/config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width, narrow = (config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    block = 2 * (hidden + width) + 2 * (hidden + narrow) + 3 * (hidden + inner)  # q, o; k, v; gate, up, down
    assert theirs["trainable"] == 16 * config["num_hidden_layers"] * block + hidden
    assert min([*measured[0]["peaks"].values(), *measured[0]["memory"].values()]) > 0


def test_losses_in_fp32_are_equal_and_move(measured):
    ours, theirs = (measured[0]["runs"][name][0]["losses"] for name in CONTENDERS)
    assert len(ours) == len(theirs) == UPDATES + WARMUP
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert difference == measured[0]["largest_loss_difference"] < 1e-5
    assert ours[0] == pytest.approx(math.log(2), abs=1e-6)  # the head of both begins with zeros
    assert max(abs(loss - math.log(2)) for loss in ours) > 1e-2


def test_useful_work_has_no_language_model_head(measured, pairs):
    block = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 64  # q and o, k and v; gate, up, down
    assert measured[0]["useful_flops"] == [4 * 2 * block * unique for unique in measured[0]["unique_tokens"][WARMUP:]]
    assert sum(measured[0]["unique_tokens"]) == sum(len(ids) for pair in pairs for ids in pair[:3])


def test_report_names_the_settings_and_has_a_row_for_each(measured):
    resolved = measured[0]["runs"]["trl-fp32"][0]["resolved"]
    assert resolved["bf16"] == resolved["gradient_checkpointing"] == "False"
    assert resolved["weights"] == "torch.float32"
    table = [line.split("|")[1].strip() for line in measured[1].splitlines() if line.startswith("| ")]
    assert table == ["contender", *CONTENDERS]
    assert "ours: python train_rm.py --model" in measured[1]
    assert "--task helpful" in measured[1]
    assert "trl-fp32: RewardConfig(" in measured[1]


def test_trl_makes_the_same_tokens_of_rows_that_are_not_cut(yardstick, world, pairs):
    datasets, trl = yardstick
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    settings = SimpleNamespace(dataset_num_proc=None, max_length=512)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    found = trl.RewardTrainer._prepare_dataset(None, datasets.Dataset.from_list(rows), tokenizer, settings, "train")
    assert found["chosen_ids"][:] == [prompt + chosen for prompt, chosen, *_ in pairs]
    assert found["rejected_ids"][:] == [prompt + rejected for prompt, _, rejected, *_ in pairs]


# -- reward_models_on_hh.py --------------------------------------------------------------------------------------------


def test_bigrams_are_hashed_words_signs_and_neighbours():
    log2, log3 = math.log(2), math.log(3)
    assert sorted(study.bigrams("No, no!").values()) == pytest.approx(
        [log2] * 5 + [log3]
    )  # no , ! "no ," ", no" "no !"
    assert study.bigrams("No, no!") == study.bigrams("no , NO !")
    assert list(study.bigrams("a")) == [0xE8B7BE43 % 2**18]  # crc32 of "a"


def test_features_are_chosen_minus_rejected():
    buckets, values, begins = study.bigram_features([("a", "b"), ("b", "b")])
    assert buckets.tolist() == [0xE8B7BE43 % 2**18, *[0x71BEEFF9 % 2**18] * 2]
    assert values.tolist() == pytest.approx([math.log(2), -math.log(2), 0])
    assert begins.tolist() == [0, 2]


def test_bradley_terry_is_where_the_gradient_vanishes():
    value, penalty = math.log(2), 0.1
    weights = study.bradley_terry(study.bigram_features([("a", "b")] * 3 + [("b", "a")]), penalty)
    a, b = weights[0xE8B7BE43 % 2**18].item(), weights[0x71BEEFF9 % 2**18].item()
    assert a == pytest.approx(-b)
    assert a > 0.1
    assert weights.count_nonzero() == 2
    wrong = 1 / (1 + math.exp((a - b) * value))  # sigmoid(-margin) of the three
    assert penalty * a == pytest.approx(value * (0.75 * wrong - 0.25 * (1 - wrong)), abs=1e-6)


def toy_pairs(texts):
    """Pairs about prompts of their own, for the whole of what hold_out asks of them."""
    return [Pair([n], [1], [2]) for n in range(len(texts))]


def test_separable_texts_are_learned_and_noise_is_not():
    texts = [(f"good word{n}", f"bad word{n}") for n in range(40)]
    weights, penalty = study.train_bigrams(toy_pairs(texts), texts, seed=0)
    assert penalty == min(study.PENALTIES)
    unseen = [("good thing", "bad thing"), ("bad idea", "good idea"), ("new", "other")]
    margins = study.linear_margins(study.bigram_features(unseen), weights)
    assert study.credits(margins).tolist() == [1, 0, 0.5]
    assert study.credits(study.linear_margins(study.bigram_features(texts), weights)).mean() == 1
    noise = [(f"word{n * 7 % 11}", f"word{n * 5 % 13}") for n in range(40)]
    assert study.train_bigrams(toy_pairs(noise), noise, seed=0)[1] == max(study.PENALTIES)


def test_length_alone():
    pairs = [Pair([9], [1] * chosen, [2] * rejected) for chosen, rejected in ((5, 3), (2, 2), (1, 4), (9, 8))]
    assert study.length_margins(pairs).tolist() == [2, 0, -3, 1]
    assert study.credits(study.length_margins(pairs)).mean() == 0.625
    assert study.credits(-study.length_margins(pairs)).mean() == 0.375


def test_the_interval_is_the_normal_one_and_pairs_of_a_prompt_stay_together():
    values = (torch.arange(400) % 2).double()  # 0, 1, 0, 1, ...
    mean, low, high = study.interval(values, range(400), 4000, 0)
    assert mean == 0.5
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.005)
    mean, *bounds = study.interval(
        values.sort().values, [n // 4 for n in range(400)], 4000, 0
    )  # 100 prompts of 4 equal
    assert mean == 0.5
    assert bounds == pytest.approx([0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05], abs=0.01)
    assert study.interval(torch.ones(5, dtype=torch.float64), range(5), 100, 0) == (1, 1, 1)
    uneven = study.interval(torch.tensor([1, 1, 1, 0], dtype=torch.float64), ["a", "a", "a", "b"], 1000, 0)
    assert uneven == (0.75, 0, 1)  # both prompts the same in half of the draws


def test_the_split_is_by_md5_of_the_stripped_prompt(tmp_path, capsys):
    assert study.part_of("How do I open a door?\n") == "train"  # 78, and 92 with the newline
    assert study.part_of("Why?") == "test"  # 95
    joke, hi = "\n\nHuman: Tell me a joke\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"  # 44 and 94
    rows = [{"chosen": f"{prompt} {n}", "rejected": f"{prompt} no"} for n, prompt in enumerate((joke, hi, joke))]
    rows.append({"chosen": f"{hi} yes", "rejected": f"{joke} no"})  # two prompts: no pair
    write_rows(tmp_path / "hh.jsonl", rows)
    study.split(str(tmp_path / "hh.jsonl"), "helpful", tmp_path / "out")
    found = {part: (tmp_path / f"out/helpful_{part}.jsonl").read_text().splitlines() for part in ("train", "test")}
    chosen = {part: [json.loads(line)["chosen_response"] for line in lines] for part, lines in found.items()}
    assert chosen == {"train": [" 0", " 2"], "test": [" 1"]}
    row = {"prompt": hi, "chosen_response": " 1", "rejected_response": " no", "dimension": "helpful"}
    assert json.loads(found["test"][0]) == row
    assert "helpful_train.jsonl: 2 rows" in capsys.readouterr().out


@pytest.fixture
def reward_models(world, tmp_path, monkeypatch):
    """{task: (folder, rows it was validated on, what reward_model.json says of them)}, of two tiny reward models."""
    rows, found = (world / "pairs.jsonl").read_text().splitlines(), {}
    for task, seed in (("helpful", 1), ("harmless", 2)):
        test, folder = tmp_path / f"{task}_test.jsonl", tmp_path / f"{task}_rm"
        write_rows(test, rows[seed : seed + 15])
        argv = ["--task", task, "--model", world / "model", "--output-dir", folder, "--seed", seed, "--epochs", 2]
        argv += [f"--train-{task}-path", world / "pairs.jsonl", f"--val-{task}-path", test, "--report-to", "none"]
        run_script([*argv, "--learning-rate", "1e-3", "--dtype", "fp32", "--device", "cpu"], train_rm)
        found[task] = folder, test, json.loads((folder / "reward_model.json").read_text())["validation"]
    return found


def test_the_table_has_what_training_said_of_the_same_pairs(world, reward_models, monkeypatch, capsys):
    seen, margins_of = [], study.reward_margins

    def one_by_one_too(model, pairs):
        seen.append(margins_of(model, pairs))
        with torch.no_grad():
            scores = [model.packed_scores(pack([pair])) for pair in pairs]
        alone = torch.cat([chosen - rejected for chosen, rejected in scores]).double()
        assert torch.allclose(seen[-1], alone, atol=1e-5)
        return seen[-1]

    monkeypatch.setattr(study, "reward_margins", one_by_one_too)
    monkeypatch.setattr(study, "PASS_TOKENS", 40)  # many passes, by length: each margin has to find its place again
    start = study.distributed.start
    monkeypatch.setattr(study.distributed, "start", lambda: start("cpu"))
    monkeypatch.setattr(study.device, "pick_dtype", lambda *_: torch.float32)
    argv = ["--model", world / "model", "--bootstrap", 50]
    for task, (folder, test, _) in reward_models.items():
        argv += [f"--{task}-rm", folder, f"--{task}-train", world / "pairs.jsonl", f"--{task}-test", test]
    capsys.readouterr()
    study.main(study.get_args([*map(str, argv)]))
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = {name.strip(): [cell.split()[:1] for cell in row] for name, *row in table[1:]}
    assert [name.split(",")[0] for name in cells] == [
        *("helpful reward model", "helpful bigrams", "helpful length"),
        *("harmless reward model", "harmless bigrams", "harmless length"),
    ]
    means = [[float(cell[0]) for cell in row if cell] for row in cells.values()]
    for at, (task, margins) in enumerate((("helpful", seen[0]), ("harmless", seen[3]))):
        said = reward_models[task][2]
        assert margins.mean().item() == pytest.approx(said["margin"], rel=1e-4)
        assert margins.std(correction=0).item() == pytest.approx(said["margin_std"], rel=1e-4)
        assert abs(said["margin"]) > 1e-3
        assert means[3 * at][at] == pytest.approx(said["accuracy"], abs=5e-4)
        assert means[3 * at][2] == pytest.approx(means[3 * at][at] - means[3 * at + 1][at], abs=1.1e-3)
        rows = [json.loads(line) for line in reward_models[task][1].read_text().splitlines()]
        longer = [
            (len(row["chosen"]) > len(row["rejected"])) - (len(row["chosen"]) < len(row["rejected"])) for row in rows
        ]
        assert means[3 * at + 2][at] == pytest.approx(
            0.5 + sum(longer) / len(rows) / 2, abs=5e-4
        )  # in training longer won
    assert means[1][0] == means[4][1] == 1  # "ab" and "cd" are other words


def test_what_is_missing_is_one_sentence(capsys):
    for words, sentence in (
        (["--model", "m"], "the following arguments are required: --helpful-rm, --helpful-train, --helpful-test"),
        (["--split", "a", "b"], "--split: expected 3 arguments"),
    ):
        with pytest.raises(SystemExit) as exit:
            study.get_args(words)
        assert exit.value.code == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
