"""train_safe_mm_dpo.py: the identity with dpo_hf_run.py, one base for four roles, what E[cost] does to lambda, resume,
ranks, what a run says and leaves, and a user's mistakes.  (The equations: test_safe_losses.py, test_safe_oracle.py.)
"""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from helpers import ROOT
from peft import PeftModel
from runs import LN2, adapter_bytes, adapter_of, ask_to_end, assert_same_files, metrics_of, one_line, run_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import distributed
import lora
import train_rm
import train_safe_mm_dpo
from formats.model_files import load_model, load_tokenizer
from packed_model import prepare_scores
from packing import pack
from preference_data import load_pairs

DTYPE = "--dtype fp32 --device cpu --report-to none".split()
FULL = "--batch-size 4 --gradient-accumulation-steps 2 --learning-rate 1e-4 --logging-steps 1".split()
QUICK = "--batch-size 4 --gradient-accumulation-steps 2 --learning-rate 1e-3 --lora-dropout 0 --logging-steps 1".split()


@pytest.fixture(scope="module")
def judges(toy, tmp_path_factory):
    """Folders of two reward models on the toy world's base: 30 updates each, harmless with labels."""
    folder = tmp_path_factory.mktemp("judges")
    for task in ("helpful", "harmless"):
        data = [
            f"--train-{task}-path",
            toy / f"train/{task}_pairs.jsonl",
            f"--val-{task}-path",
            toy / f"val/{task}_pairs.jsonl",
        ]
        size = "--batch-size 16 --gradient-accumulation-steps 1 --learning-rate 3e-3 --max-steps 30".split()
        run_script(
            ["--task", task, "--model", toy / "model", *data, *size, *DTYPE, "--output-dir", folder / task], train_rm
        )
    return folder


@pytest.fixture
def train(toy, judges, tmp_path, capsys):
    """train(name, words ...) -> (folder, log, metrics): 160 + 160 rows, 40 held out of each."""

    def run(name, *words, quick=QUICK):
        where = [
            "--model",
            toy / "model",
            "--helpful-rm-path",
            judges / "helpful",
            "--harmless-rm-path",
            judges / "harmless",
        ]
        for part in ("train", "val"):
            for task in ("helpful", "harmless"):
                where += [f"--{part}-{task}-path", toy / f"{part}/{task}_pairs.jsonl"]
        size = ["--num-samples", 160, "--eval-samples", 40, "--cache-dir", tmp_path / "cache"]
        size += ["--max-length", 64, "--max-prompt-length", 32]
        words = [*where, *size, *DTYPE, *quick, "--output-dir", tmp_path / name, *words]
        capsys.readouterr()
        run_script(words, train_safe_mm_dpo)
        metrics = metrics_of(tmp_path / name)
        return tmp_path / name, capsys.readouterr().out, metrics

    return run


# -- identities -----------------------------------------------------------------------------------------------------


def test_without_a_constraint_it_is_dpo_hf_run_byte_for_byte(toy, train, tmp_path):
    changes = ["--max-steps", 7, "--beta", 0.3, "--warmup-steps", 2, "--lora-dropout", 0.1, "--nll-coeff", 0.1]
    off = ["--combine", "additive", "--lambda-init", 0, "--w", 0, "--kl-coeff", 0]
    # Neither reward model nor harmless rows are read: their paths lead nowhere.
    nowhere = [word for name in ("helpful-rm", "harmless-rm", "train-harmless", "val-harmless")
               for word in (f"--{name}-path", tmp_path / "nowhere")]  # fmt: skip
    ours, log, metrics = train("ours", *changes, *off, *nowhere)
    data = ["--model", toy / "model", "--dataset", toy / "train/helpful_pairs.jsonl", "--num-samples", 160]
    data += ["--eval-dataset", toy / "val/helpful_pairs.jsonl", "--eval-samples", 40]
    data += ["--max-length", 64, "--max-prompt-length", 32]
    run_script([*data, *DTYPE, *QUICK, *changes, "--output-dir", tmp_path / "dpo"])
    assert adapter_bytes(ours) == adapter_bytes(tmp_path / "dpo")
    theirs = metrics_of(tmp_path / "dpo")
    for mine, other in zip(metrics, theirs, strict=True):
        for key in mine.keys() & other.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-6), key
    moved = adapter_of(ours)
    assert max(value.abs().max() for key, value in moved.items() if "lora_B" in key) > 1e-4


def test_on_equal_rows_the_additive_result_does_not_depend_on_lambda(toy, train):
    """Helpful rows = harmless rows, w = 0: the two losses are one, and one row stands for both."""
    same = toy / "train/harmless_pairs.jsonl"
    common = ["--train-helpful-path", same, "--w", 0, "--lambda-lr", 0, "--max-steps", 4, "--eval-samples", 0]
    folders = [train(name, *common, "--lambda-init", value) for name, value in (("a", 0.1), ("b", 8))]
    assert "160 with a helpful label, 160 with a harmless label" in folders[0][1]
    assert "160 pairs to train on" in folders[0][1]
    ours, theirs = (adapter_of(folder) for folder, _, _ in folders)
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-5
    different = train("c", *common, "--lambda-init", 8, "--train-helpful-path", toy / "train/helpful_pairs.jsonl")
    other = load_file(different[0] / "adapter_model.safetensors")
    assert max((ours[key] - other[key]).abs().max().item() for key in ours) > 1e-3  # there is something to see


def test_the_first_update_of_each_mode(train):
    """ln 2 where nothing has moved; with joint labels the loss is that of the reward models' probabilities."""
    for mode in ("additive", "margin", "soft"):
        _, _, metrics = train(mode, "--combine", mode, "--max-steps", 1)
        first = next(entry for entry in metrics if "loss_H" in entry)
        assert first["loss_H"] == pytest.approx(LN2, abs=1e-6) and first["loss_S"] == pytest.approx(LN2, abs=1e-6)
        assert metrics[0]["eval_KL"] == 0 and metrics[0]["eval_loss_S"] == pytest.approx(LN2, abs=1e-6)
        beta = 0.1 if mode != "additive" else first["beta_S"]
        assert first["beta_S"] == pytest.approx(beta) and 0.1 <= first["beta_S"] < 0.15 + 1e-6


# -- one base, four roles -------------------------------------------------------------------------------------------


def test_reward_models_on_the_policys_base_are_adapters_and_give_the_scores_of_their_own_model(
    train, toy, judges, tmp_path
):
    _, log, _ = train("shared", "--max-steps", 1)
    for task in ("helpful", "harmless"):
        assert re.search(rf"{task} reward model \S+: an adapter on the policy's frozen base, 0\.\d MB", log)
    (cached,) = (tmp_path / "cache").glob("harmless-*.safetensors")
    scores = load_file(cached)["scores"]
    model = load_model(toy / "model", torch.float32, "cpu", scores=True)
    _, head = lora.load_adapter(model, judges / "harmless", "reward", with_head=True)
    prepare_scores(model)
    read = partial(load_pairs, tokenizer=load_tokenizer(toy / "model"), max_length=64, max_prompt_length=32, limit=160)
    pairs = [pair for task in ("helpful", "harmless") for pair in read(toy / f"train/{task}_pairs.jsonl")[0]]
    some = scores.isfinite().all(1).nonzero()[:5, 0].tolist()  # of the 8 pairs of the update
    with torch.no_grad():
        alone = torch.stack(model.packed_scores(pack([pairs[i] for i in some]), head), dim=1)
    assert torch.allclose(scores[some], alone, atol=1e-4)
    assert alone.std() > 0.1


def test_a_reward_model_on_another_base_is_loaded_by_itself_and_says_the_same(train, toy, judges, tmp_path):
    """The same base under another hash: the numbers and the trained adapter are those of the shared one."""
    shared, _, _ = train("shared", "--max-steps", 2, "--cost-estimate", "snis")
    other = tmp_path / "other"
    for task in ("helpful", "harmless"):
        shutil.copytree(judges / task, other / task)
        record = json.loads((other / task / "reward_model.json").read_text())
        (other / task / "reward_model.json").write_text(json.dumps(record | {"base_sha256": "0" * 64}))
        (other / task / "manifest.json").unlink()  # which would say that it was changed
    words = ["--helpful-rm-path", other / "helpful", "--harmless-rm-path", other / "harmless"]
    alone, log, _ = train("alone", "--max-steps", 2, "--cost-estimate", "snis", *words)
    assert log.count("a model of its own, 0.00 GB (its base is another)") == 2
    ours, theirs = (adapter_of(folder) for folder in (shared, alone))
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-5


def test_frozen_numbers_are_computed_once(train):
    _, first, _ = train("first", "--max-steps", 1)
    assert len(re.findall(r"(?:log-probs|scores) of 88 pairs: computed now", first)) == 3
    _, second, _ = train("second", "--max-steps", 1, "--combine", "soft")
    assert len(re.findall(r"(?:log-probs|scores) of 88 pairs: read from", second)) == 3


def test_full_fine_tuning(train, tmp_path):
    folder, log, metrics = train("full", "--lora-r", 0, "--max-steps", 2, quick=FULL)
    assert "Full fine-tuning of policy model" in log and log.count("a model of its own") == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size > 0
    assert metrics[-1]["eval_KL"] > 0


# -- lambda and E[cost] -----------------------------------------------------------------------------------------------


def logged(metrics, name):
    return [entry[name] for entry in metrics if name in entry]


@pytest.mark.parametrize("estimate", ["policy", "snis"])
def test_lambda_follows_the_cost(train, estimate):
    """Up where the cost is above the threshold, down where it is below, by the rule log lambda += lr lambda J."""
    words = ["--cost-estimate", estimate, "--cost-every", 2, "--lambda-lr", 0.002, "--max-steps", 6]
    for threshold, sign in ((-20, 1), (20, -1)):
        _, _, metrics = train(f"{estimate}{threshold}", *words, "--cost-threshold", threshold)
        values, violations = [1.0, *logged(metrics, "lambda")], logged(metrics, "J_C")
        for before, after, violation in zip(values, values[1:], violations):
            if violation:  # 0: before the first estimate that may be used
                assert after == pytest.approx(before * torch.tensor(0.002 * before * violation).exp().item(), rel=1e-5)
                assert (after - before) * sign > 0
        assert any(violations)


@pytest.mark.parametrize("end", [None, 7])
def test_sampled_cost_is_the_harmless_models_mean_over_responses_of_the_policy(toy, judges, train, end):
    """Against a loop of its own: the same prompts and responses, scored one by one by the model loaded alone.

    end: what the pairs' responses end in, where it is not the end-of-sequence (a chat's turn, as Gemma's).
    """
    from expected_cost import numbers_of, prompts_of, sampled_pairs, shuffled
    from harness.run import Frozen
    from packed_model import prepare_model
    from sampling import sample
    from train_safe_mm_dpo import get_args

    tokenizer = load_tokenizer(toy / "model")
    pairs, _ = load_pairs(str(toy / "val/harmless_pairs.jsonl"), tokenizer, 512, 256, limit=30)
    prompts = prompts_of([pair._replace(end=end) for pair in pairs], tokenizer.eos_token_id)
    policy = load_model(toy / "model", torch.float32, "cpu")
    _, head = lora.load_adapter(policy, judges / "harmless", "harmless", with_head=True)
    lora.switch_adapter(policy, None)
    prepare_model(policy)
    args = get_args(
        ["--batch-size", "4", "--gradient-accumulation-steps", "2", "--max-length", "64", "--max-prompt-length", "32"]
    )
    args.tokens_per_microbatch = 0
    world = distributed.World(0, 1, torch.device("cpu"))

    def scored(seed, parts, responses=4):
        some, found = shuffled(prompts, seed)[:6], []
        for first in range(0, 6, 6 // parts):
            part = some[first : first + 6 // parts]
            found += sampled_pairs(policy, tokenizer, part, responses, seed, first, args, world)
        return found, numbers_of(Frozen(policy, "harmless", head), found, args, world)

    found, scores = scored(5, 1)
    assert scored(5, 3)[0] == found != scored(6, 1)[0]  # in one draw or in several
    alone = load_model(toy / "model", torch.float32, "cpu", scores=True)
    lora.load_adapter(alone, judges / "harmless", "reward", with_head=True)
    asked = [prompt.prompt_ids for prompt in shuffled(prompts, 5)[:6] for _ in range(4)]
    responses, eos = sample(policy, tokenizer, asked, 32, 5), tokenizer.eos_token_id
    responses = [[*r[:-1], end or eos] if r[-1] == eos else r for r in responses]
    assert [(p, r) for p, *both in (pair[:3] for pair in found) for r in both] == list(zip(asked, responses))
    with torch.no_grad():
        ends = [alone.base_model(torch.tensor([p + r])).last_hidden_state[0, -1] for p, r in zip(asked, responses)]
    assert scores.flatten().tolist() == pytest.approx((torch.stack(ends) @ head[0]).tolist(), abs=1e-4)


def test_a_fixed_lambda_and_its_bounds(train, capsys):
    _, _, metrics = train("fixed", "--lambda-init", 3, "--lambda-lr", 0, "--max-steps", 3)
    assert logged(metrics, "lambda") == pytest.approx([3, 3, 3])
    assert all(value is not None for value in logged(metrics, "E_cost"))  # measured all the same
    words = ["--lambda-lr", 5, "--cost-threshold", -20, "--lambda-max", 2, "--max-steps", 52, "--cost-every", 60]
    _, log, metrics = train("cap", *words, "--eval-samples", 0, "--batch-size", 1, "--gradient-accumulation-steps", 1)
    assert logged(metrics, "lambda")[-1] == pytest.approx(2)
    assert log.count("lambda has been at its cap of 2 for 50 updates") == 1
    _, _, metrics = train("floor", *words[:2], "--cost-threshold", 20, "--lambda-min", 0.5, "--max-steps", 3)
    assert logged(metrics, "lambda")[-1] == pytest.approx(0.5)


def uncalibrated(judges, folder):
    """The harmless model, with a record that knows no zero."""
    shutil.copytree(judges / "harmless", folder)
    record = json.loads((folder / "reward_model.json").read_text())
    (folder / "reward_model.json").write_text(json.dumps(record | {"calibrated": False}))
    (folder / "manifest.json").unlink()
    return folder


def test_thresholds(train, judges, tmp_path):
    said = r"threshold (\S+): (.*)"
    _, log, _ = train("auto", "--cost-threshold", "auto", "--max-steps", 1)
    value, how = re.search(said, log).groups()
    what = (
        r"a harm rate of about 5 % by the harmless model: (the policy's own|validation) safe responses cost (\S+) and"
    )
    safe, harmful = map(float, re.search(what + r" harmful ones (\S+)", how).groups()[1:])
    assert safe < 0 < harmful
    assert float(value) == pytest.approx(safe + 0.05 * (harmful - safe), abs=1e-4)
    words = ["--harmless-rm-path", uncalibrated(judges, tmp_path / "uncalibrated"), "--max-steps", 1]
    _, log, _ = train("relative", "--cost-threshold", "auto", *words)
    start = float(re.search(r"E\[cost\] before training (\S+) ±", log).group(1))
    value, how = re.search(said, log).groups()
    assert how == "what the cheaper of two of the policy's own responses costs"
    assert start - 1 < float(value) < start
    _, log, _ = train("zero", *words)
    assert "its zero means nothing" in re.search(said, log).group(2)
    _, log, _ = train("zero calibrated", "--max-steps", 1)
    assert "means nothing" not in log
    _, log, _ = train("rate", "--harm-rate", 0.2, "--max-steps", 1)
    assert re.search(said, log).groups() == ("0.2000", "--harm-rate, by the harmless model")


def test_scores_on_one_side_of_the_threshold_are_told(train):
    _, log, _ = train("above", "--cost-threshold", -50, "--max-steps", 1)
    assert re.search(
        r"harmless model gives all of the training responses a cost above the threshold .*cannot be met", log
    )
    _, log, _ = train("below", "--cost-threshold", 50, "--max-steps", 1)
    assert re.search(r"a cost below the threshold .*never binds", log)
    _, log, _ = train("between", "--max-steps", 1)
    assert "of the training responses a cost" not in log


def test_cost_prompts_all_asks_the_helpful_rows_too(train):
    costs = [
        logged(train(which, "--cost-prompts", which, "--max-steps", 1)[2], "E_cost")[0] for which in ("harmless", "all")
    ]
    assert costs[0] != costs[1]
    snis = [train(f"snis {which}", "--cost-prompts", which, "--cost-estimate", "snis", "--max-steps", 4)[2]
            for which in ("harmless", "all")]  # fmt: skip
    assert logged(snis[1], "ess")[0] == pytest.approx(16, rel=0.05)  # 8 pairs, hardly moved
    assert logged(snis[0], "ess")[0] < 14
    assert logged(snis[1], "E_cost")[0] is None and logged(snis[1], "E_cost")[-1] is not None  # 32 are needed


# -- resume and ranks -------------------------------------------------------------------------------------------------

RUN = ["--max-steps", 6, "--lora-dropout", 0.1, "--lambda-lr", 0.1, "--eval-samples", 0, "--save-steps", 2]


def test_resumed_by_importance_weights_is_uninterrupted_lambda_included(train, tmp_path, monkeypatch):
    words = [*RUN, "--cost-estimate", "snis"]
    whole, _, _ = train("whole", *words)
    ask_to_end(monkeypatch, 5)
    with pytest.raises(SystemExit) as exit:
        train("broken", *words)
    assert exit.value.code == 143
    state = json.loads((tmp_path / "broken/checkpoint-5/state.json").read_text())
    assert state["constraint"]["multiplier"]["log"] != 0 and state["constraint"]["threshold"] == 0
    monkeypatch.undo()
    resumed, log, _ = train("broken", *words, "--resume", "auto")
    assert "resumed from" in log
    assert_same_files(resumed, whole)


# -- what a run says and leaves ---------------------------------------------------------------------------------------


def test_log_lines_and_files(train, toy, tmp_path):
    folder, log, metrics = train("run", "--epochs", 2, "--num-samples", 24, "--logging-steps", 3, "--save-merged")
    line = r"Epoch 1 step 3 loss_H=\d\.\d{4} loss_S=\d\.\d{4} KL=\d\.\d{4} lambda=\d\.\d{4} "
    line += r"J_C=-?\d+\.\d{4} E_cost=-?\d+\.\d{4} ± \d+\.\d{4} E_cost_raw=-?\d+\.\d{4} "
    assert re.search(line + r"beta_H=0\.1\d{3} beta_S=0\.1\d{3} ", log)
    assert re.search(r"LoRA enabled for policy model: [\d,]+ trainable / [\d,]+ total parameters \(\d+\.\d\d%\)", log)
    assert "Effective batch size: 8 (batch_size=4 x accumulation=2 x 1 processes)" in log
    assert f"Saved epoch 2 checkpoint to {folder}/epoch_2" in log
    assert (folder / "epoch_1/adapter_model.safetensors").read_bytes() != adapter_bytes(folder)
    assert (folder / "epoch_2/adapter_model.safetensors").read_bytes() == adapter_bytes(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy / "model"), folder / "epoch_2")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, merged(ids).logits, atol=1e-3)
    assert {"README.md", "args.json", "trainer_state.json", "train_safe_mm_dpo.py"} <= {
        p.name for p in folder.iterdir()
    }
    assert metrics[-1]["eval_accuracy_S"] >= 0 and metrics[-1]["eval_accuracy_S_ci95"] >= 0


def test_the_shipped_config_has_the_documents_values(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = train_safe_mm_dpo.get_args(["--config", "configs/dpo_config.yaml"])
    documented = dict(
        beta=0.1, w=0.5, k=0.5, kl_coeff=0.1, lambda_init=1.0, lambda_lr=0.01, cost_threshold=0.0, epochs=2
    )
    documented |= dict(batch_size=4, gradient_accumulation_steps=4, learning_rate=1e-4, lora_r=16, lora_alpha=32)
    documented |= dict(
        lora_dropout=0.1, warmup_steps=100, max_length=512, max_grad_norm=1.0, lambda_max=10, lambda_min=1e-6
    )
    assert {name: getattr(args, name) for name in documented} == documented


def test_defaults_of_w_and_kl_depend_on_the_mode(capsys):
    for mode, w, kl in (("additive", 0.5, 0.1), ("margin", 0, 0), ("soft", 0, 0)):
        args = train_safe_mm_dpo.get_args(["--combine", mode])
        assert (args.w, args.kl_coeff) == (w, kl)
        assert capsys.readouterr().err == ""
    args = train_safe_mm_dpo.get_args(["--combine", "soft", "--λ_init", "2", "--kl-coeff", "0.2", "--k", "3"])
    assert (args.w, args.kl_coeff, args.lambda_init, args.k) == (0, 0.2, 2, 3)
    assert "--kl-coeff 0.2: --combine soft is exact" in capsys.readouterr().err


# -- a user's mistakes --------------------------------------------------------------------------------------------


def wrong_task(folder, judges):
    return ["--helpful-rm-path", judges / "harmless"], "is a harmless reward model, and a helpful one is needed"


def no_helpful_model(folder, judges):
    return ["--combine", "soft", "--helpful-rm-path", folder / "none"], "none is no reward model (no reward_model.json"


def another_tokenizer(folder, judges):
    shutil.copytree(judges / "harmless", folder / "other")
    content = json.loads((folder / "other/tokenizer.json").read_text())
    content["added_tokens"].append(
        content["added_tokens"][-1] | {"id": len(content["model"]["vocab"]) + 1, "content": "<x>"}
    )
    (folder / "other/tokenizer.json").write_text(json.dumps(content))
    (folder / "other/manifest.json").unlink()
    return ["--harmless-rm-path", folder / "other"], "was trained with another tokenizer than the policy's"


def without_its_head(folder, judges):
    shutil.copytree(judges / "harmless", folder / "headless")
    weights = adapter_of(folder / "headless")
    save_file({k: v for k, v in weights.items() if "score" not in k}, folder / "headless/adapter_model.safetensors")
    record = json.loads((folder / "headless/reward_model.json").read_text())
    del record["sha256"]  # as of a model that is older than the record of its files
    (folder / "headless/reward_model.json").write_text(json.dumps(record))
    (folder / "headless/manifest.json").unlink()
    return ["--harmless-rm-path", folder / "headless"], "is no reward model: it has no head score.weight"


def empty_file(folder, judges):
    (folder / "empty.jsonl").write_text("")
    return ["--train-harmless-path", folder / "empty.jsonl"], "the file is empty"


def missing_file(folder, judges):
    return ["--val-harmless-path", folder / "none.jsonl"], "there is no file"


def lambda_out_of_bounds(folder, judges):
    return ["--lambda-init", 20], "--lambda-init 20 is not within --lambda-min and --lambda-max"


def threshold_is_a_word(folder, judges):
    return ["--cost-threshold", "low"], "--cost-threshold: expected a number, got 'low'"


def auto_without_statistics(folder, judges):
    shutil.copytree(judges / "harmless", folder / "blind")
    record = json.loads((folder / "blind/reward_model.json").read_text())
    (folder / "blind/reward_model.json").write_text(json.dumps(record | {"validation": {}}))
    (folder / "blind/manifest.json").unlink()
    return [
        "--harmless-rm-path",
        folder / "blind",
        "--cost-threshold",
        "auto",
    ], "auto needs a harmless model that was validated"


MISTAKES = [wrong_task, no_helpful_model, another_tokenizer, without_its_head, empty_file, missing_file]
MISTAKES += [lambda_out_of_bounds, threshold_is_a_word, auto_without_statistics]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_one_sentence_and_nothing_left(train, judges, tmp_path, capsys, mistake):
    words, sentence = mistake(tmp_path, judges)
    with pytest.raises(SystemExit) as exit:
        train("out", *words, "--max-steps", 1)
    assert exit.value.code == 2
    assert sentence in one_line(capsys)
    assert not (tmp_path / "out/metrics.jsonl").exists()
