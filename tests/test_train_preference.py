"""train_with_preference_prompt.py: its loss against plain fp64 forwards, identities, ranks, resume, files.
(What it does to the toy world: test_learn_prompt.py.)
"""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from runs import LN2, adapter_bytes, adapter_of, ask_to_end, assert_same_files, metrics_of, one_line, run_script
from safetensors.torch import load_file, save_file
from tiny_models import double_model, logps_of_one, random_pairs
from transformers import AutoModelForCausalLM, TrainerState
from worlds import Code

import lora
import train_with_preference_prompt as script
from formats.model_files import load_model, load_tokenizer
from packed_model import prepare_model
from packing import pack
from preference_data import load_pairs
from preference_prompt import use_soft_prompt, with_virtual_tokens

QUICK = """--dtype fp32 --device cpu --report-to none --learning-rate 1e-2 --batch-size 4 --max-length 64
    --gradient-accumulation-steps 2 --max-prompt-length 32 --eval-samples 0 --logging-steps 1""".split()
TEXT = "Be nice!"


@pytest.fixture
def train(world, tmp_path, capsys):
    """train(name, words ...) -> (folder, log, lines of metrics.jsonl)."""

    def run(name, *words, text=TEXT):
        where = ["--model", world / "model", "--dataset-path", world / "pairs.jsonl", "--output-dir", tmp_path / name]
        where += [] if text is None else ["--preference-text", text]
        capsys.readouterr()
        run_script([*where, "--logging-dir", tmp_path / name / "logs", *QUICK, *words], script)
        return tmp_path / name, capsys.readouterr().out, metrics_of(tmp_path / name)

    return run


SOFT = ["--use-prompt-embedding", "--prompt-embedding-path"]

# -- the loss ---------------------------------------------------------------------------------------------------------


def by_hand(policy, reference, pairs, prompts, args, vectors=None, teacher=None):
    """{metric: (B,)} and the loss of the update, as the issue writes it; teacher: (B, 2) constants, not a pass."""
    rows = {"dpo_loss": [], "aligned_loss": [], "pref_delta_chosen": [], "pref_delta_rejected": [], "nll_loss": []}
    kl, tokens = 0, 0
    for place, ((prompt, chosen, rejected, *_), prompted) in enumerate(zip(pairs, prompts)):
        pc, pr = (logps_of_one(policy, prompt, response) for response in (chosen, rejected))
        with torch.no_grad():
            rc, rr = (logps_of_one(reference, prompt, response) for response in (chosen, rejected))
            tc, tr = (logps_of_one(policy, prompted, response, vectors) for response in (chosen, rejected))
            tc, tr = (tc, tr) if teacher is None else teacher[place]
        rows["dpo_loss"].append(-F.logsigmoid(args.beta * ((pc - rc) - (pr - rr))))
        missing = (tc - tr) - (pc - pr)
        rows["aligned_loss"].append(missing**2 / 2 if args.stop_at_gap else missing.clamp(min=0))
        rows["pref_delta_chosen"].append(tc - pc.detach())
        rows["pref_delta_rejected"].append(tr - pr.detach())
        rows["nll_loss"].append(-pc / len(chosen))
        for response in (chosen, rejected):
            p = logps_of_one(policy, prompt, response, logits=True)
            q = logps_of_one(reference, prompt, response, logits=True).detach()
            kl, tokens = kl + (p.exp() * (p - q)).sum(), tokens + len(response)
    rows = {name: torch.stack(values) for name, values in rows.items()}
    rows["log_pref_advantage"] = rows["pref_delta_chosen"] - rows["pref_delta_rejected"]
    rows["pref_advantage_ratio"] = rows["log_pref_advantage"].exp()
    loss = (args.alpha * rows["aligned_loss"] + args.nll_coeff * rows["nll_loss"]).mean()
    loss = loss if args.stop_at_gap else loss + rows["dpo_loss"].mean()
    rows["kl_div"] = kl / tokens
    return {name: value.detach() for name, value in rows.items()}, loss + args.lambda_kl * kl / tokens


def moved_policy(name="qwen3"):
    """A double model with a LoRA policy that has left its base, and an untouched base."""
    model, base = double_model(name), double_model(name)
    torch.manual_seed(3)
    parameters = lora.add_adapter(model, "policy", 4, 8)
    model.double()
    for parameter in parameters:
        parameter.data.normal_(0, 0.1)
    return model, base, parameters


@pytest.mark.parametrize("soft", [False, True], ids=["text", "soft prompt"])
@pytest.mark.parametrize(("teacher", "stops"), [("policy", False), ("ref", False), ("ref", True)])
def test_the_loss_and_its_gradient_are_those_of_plain_forwards_in_fp64(teacher, stops, soft):
    """The teacher's pass stands under no_grad in `by_hand`: with a gradient through it the sums below would differ."""
    args = SimpleNamespace(beta=0.3, alpha=0.7, lambda_kl=0.4, nll_coeff=0.2, teacher=teacher, stop_at_gap=stops)
    policy, base, parameters = moved_policy()
    pairs, vectors = random_pairs([(5, 4, 3), (2, 3, 5), (9, 1, 6), (4, 6, 2)]), None
    put = lambda prompt: [3, 9, 27, *prompt]  # noqa: E731
    if soft:
        vectors = torch.randn(3, 32, dtype=torch.float64)
        put = lambda prompt: with_virtual_tokens(prompt, 3, "prefix")  # noqa: E731
    behind = [pair._replace(prompt_ids=put(pair.prompt_ids)) for pair in pairs]
    given = None
    if teacher == "ref":
        with torch.no_grad():
            prompts = [pair.prompt_ids if soft else row.prompt_ids for pair, row in zip(pairs, behind)]
            given = [[logps_of_one(base, p, pair[side], vectors) for side in (1, 2)] for p, pair in zip(prompts, pairs)]
    prompts = [pair.prompt_ids if soft else row.prompt_ids for pair, row in zip(pairs, behind)]
    expected, loss = by_hand(policy, base, pairs, prompts, args, vectors, given)
    assert stops or (expected["aligned_loss"] > 0).sum() in (1, 2, 3), (
        "some pairs above the teacher's margin, some below"
    )
    expected_gradient = torch.autograd.grad(loss, parameters)

    prepare_model(policy)
    if soft:
        use_soft_prompt(policy, vectors)
    facts = torch.full((4, 4), float("nan"), dtype=torch.float64)
    with torch.no_grad():
        facts[:, :2] = torch.tensor([[logps_of_one(base, p[0], p[side]) for side in (1, 2)] for p in pairs])
    if given:
        facts[:, 2:] = torch.tensor(given)
    facts = script.PairFacts(*facts.unbind(1))
    batch, states = pack(pairs), script.reference_states(policy, pack(pairs))
    prompted = pack(behind) if teacher == "policy" else None
    losses, kl, metrics = script.pair_losses(policy.train(), batch, prompted, facts, args, states)
    assert policy.training
    total = losses.sum() / 4 + args.lambda_kl * kl.sum() / metrics["tokens"].sum()
    torch.testing.assert_close(total, loss, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(total, parameters), expected_gradient):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    found = {name.rpartition("/")[2]: values.detach() for name, values in metrics.items()}
    for name in expected.keys() - {"kl_div"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)
    assert metrics["tokens"].tolist() == [7, 8, 7, 8] and torch.equal(metrics["loss_components/kl_div"], kl)


@pytest.mark.parametrize("soft", [False, True], ids=["text, policy as teacher", "soft prompt, reference as teacher"])
def test_the_first_update_of_a_run_is_that_of_plain_forwards(train, world, soft):
    """Against another reference, so that nothing is 0 or ln 2: what the log says of 8 pairs in 2 passes."""
    words = ["--ref-model-path", world / "other", "--num-samples", 8, "--max-steps", 1, "--alpha", 0.5, "--lora-r", 0]
    words += [*SOFT, world / "soft.safetensors", "--teacher", "ref"] if soft else []
    words += ["--lambda-kl", 0.3, "--beta", 0.2, "--nll-coeff", 0.1]
    _, _, (line,) = train("run", *words, text=None if soft else TEXT)
    args = SimpleNamespace(beta=0.2, alpha=0.5, lambda_kl=0.3, nll_coeff=0.1, stop_at_gap=False)
    policy, reference = (load_model(world / name, torch.float64, "cpu") for name in ("model", "other"))
    pairs, _ = load_pairs(str(world / "pairs.jsonl"), load_tokenizer(world / "model"), 64, 32, limit=8)
    prompts, vectors, given = [pair.prompt_ids + [ord(letter) for letter in f" {TEXT}"] for pair in pairs], None, None
    if soft:
        prompts, vectors = (
            [pair.prompt_ids for pair in pairs],
            load_file(world / "soft.safetensors")["prompt_embeddings"],
        )
        with torch.no_grad():
            given = [[logps_of_one(reference, pair[0], pair[side], vectors) for side in (1, 2)] for pair in pairs]
    expected, loss = by_hand(policy, reference, pairs, prompts, args, vectors, given)
    for key, value in line.items():
        name = key.rpartition("/")[2]
        if name in expected and name != "pref_advantage_ratio":  # exponentials of up to e^20
            assert value == pytest.approx(expected[name].mean().item(), rel=1e-4, abs=1e-4), key
    assert line["preference_metrics/pref_advantage_ratio"] == pytest.approx(
        expected["pref_advantage_ratio"].mean().item(), rel=1e-3
    )
    assert line["loss"] == line["loss/train"] == pytest.approx(loss.item(), rel=1e-4)
    gradient = torch.autograd.grad(loss, list(policy.parameters()))
    assert line["grad_norm"] == pytest.approx(torch.stack([g.norm() for g in gradient]).norm().item(), rel=1e-3)
    assert line["loss_components/kl_div"] > 0.1 and line["loss_components/aligned_loss"] > 0.1
    assert line["rewards_train/accuracy"] == line["rewards/accuracies"]


def test_the_teacher_has_no_dropout():
    args = SimpleNamespace(beta=0.3, alpha=0.7, lambda_kl=0, nll_coeff=0, teacher="policy", stop_at_gap=False)
    policy, _, _ = moved_policy()
    for layer in lora.lora_layers(policy).values():
        layer.settings["policy"] = (2.0, 0.5)
    prepare_model(policy)
    batch, facts = pack(random_pairs([(5, 4, 3), (2, 3, 5)])), torch.zeros(2, 4, dtype=torch.float64)
    with torch.no_grad():
        still, dropped = (policy.train(mode).packed_logps(batch)[0] for mode in (False, True))
    found = script.pair_losses(policy.train(), batch, batch, script.PairFacts(*facts.unbind(1)), args)[2]
    torch.testing.assert_close(found["preference_metrics/pref_delta_chosen"] + found["logps/chosen"], still)
    assert (found["logps/chosen"] - still).abs().min() > 0.01 and (dropped - still).abs().min() > 0.01


# -- identities -------------------------------------------------------------------------------------------------------


def test_an_empty_text_changes_nothing_exactly(train):
    words = ["--preference-text", "", "--lora-dropout", 0, "--epochs", 3, "--eval-samples", 4, "--alpha", 2]
    folder, log, metrics = train("empty", *words, text=None)
    assert len(metrics) == 9 + 2  # 20 pairs, 8 to an update, and two evaluations
    for line in metrics:
        before = "eval_" if "eval_loss" in line else ""
        names = (
            "loss_components/aligned_loss preference_metrics/pref_delta_chosen preference_metrics/pref_delta_rejected"
        )
        assert [line[before + name] for name in names.split()] == [0, 0, 0]
        assert line[f"{before}preference_metrics/pref_advantage_ratio"] == 1
        assert f"{before}preference_metrics/gap_closed" not in line  # 0 / 0
    assert metrics[-1]["eval_loss"] < LN2 - 0.01
    plain, _, _ = train("plain", *words, "--alpha", 0, text=None)
    assert adapter_bytes(folder) == adapter_bytes(plain)


@pytest.mark.parametrize(
    "how", [["--lora-dropout", 0.1], ["--lora-r", 0, "--learning-rate", 1e-3]], ids=["LoRA", "all"]
)
def test_without_its_own_terms_it_is_dpo_hf_run_byte_for_byte(train, world, tmp_path, how):
    words = ["--epochs", 2, "--eval-samples", 4, "--beta", 0.3, "--warmup-steps", 2, "--nll-coeff", 0.1, *how]
    ours, _, metrics = train("ours", *words, "--alpha", 0, "--lambda-kl", 0)
    data = ["--model", world / "model", "--dataset", world / "pairs.jsonl", "--num-samples", 0]
    run_script([*data, *QUICK, *words, "--output-dir", tmp_path / "dpo"])
    weights = "model.safetensors" if "--lora-r" in how else "adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (tmp_path / "dpo" / weights).read_bytes()
    for mine, other in zip(metrics, metrics_of(tmp_path / "dpo"), strict=True):
        for key in mine.keys() & other.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-6), key
    assert metrics[-1]["eval_loss"] < LN2 - 0.01
    for name, more in {"alpha": ["--lambda-kl", 0], "kl": ["--alpha", 0]}.items():
        other, _, _ = train(name, *words, *more)  # and each term does something
        assert (other / weights).read_bytes() != (ours / weights).read_bytes()


def test_the_reference_as_teacher_is_the_base_without_adapter_all_along(train, world):
    """Every update sees the same 8 pairs: what the text is worth to the base stays, the policy moves towards it."""
    words = ["--num-samples", 8, "--epochs", 4, "--teacher", "ref", "--alpha", 1, "--eval-samples", 8]
    folder, _, metrics = train("ref", *words, "--test-dataset-path", world / "pairs.jsonl")
    base = load_model(world / "model", torch.float64, "cpu")
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "model"), folder).double()
    pairs, _ = load_pairs(str(world / "pairs.jsonl"), load_tokenizer(world / "model"), 64, 32, limit=8)
    text = [ord(letter) for letter in f" {TEXT}"]

    @torch.no_grad()
    def margins(model, extra):
        logps = [[logps_of_one(model, pair[0] + extra, pair[side]) for side in (1, 2)] for pair in pairs]
        return torch.tensor(logps).diff(dim=1)[:, 0].neg()

    teacher, start, end = margins(base, text), margins(base, []), margins(trained, [])
    for line in metrics:
        before = "eval_" if "eval_loss" in line else ""
        gap = line[f"{before}preference_metrics/pref_gap"]
        assert gap == pytest.approx((teacher - start).mean().item(), abs=1e-4)
    first, last = (line["eval_loss_components/aligned_loss"] for line in (metrics[0], metrics[-1]))
    assert first == pytest.approx((teacher - start).relu().mean().item(), abs=1e-4)
    assert last == pytest.approx((teacher - end).relu().mean().item(), abs=1e-4)
    closed = (end - start).mean() / (teacher - start).mean()
    assert metrics[-1]["eval_preference_metrics/gap_closed"] == pytest.approx(closed.item(), rel=1e-4, abs=1e-4)
    assert abs(last - first) > 0.1


# -- soft prompts and mistakes ----------------------------------------------------------------------------------------


def test_a_soft_prompt_of_the_texts_own_embeddings_is_the_text_mode(train, world, tmp_path):
    """Plain strings get ` text` behind them: so do the vectors before the response.  The adapters agree to rounding."""
    model = load_model(world / "model", torch.float32, "cpu")
    vectors = model.get_input_embeddings()(torch.tensor([ord(letter) for letter in f" {TEXT}"])).detach()
    torch.save(vectors, tmp_path / "text.pt")
    words = ["--eval-samples", 4, "--max-steps", 4, "--alpha", 1]
    text, _, expected = train("text", *words)
    where = [*SOFT, tmp_path / "text.pt", "--preference-position"]
    soft, log, metrics = train("soft", *words, *where, "before-response", text=None)
    assert f"soft prompt: {len(TEXT) + 1} vectors of width 32, before-response" in log
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours == {key: pytest.approx(value, rel=1e-5, abs=1e-5) for key, value in theirs.items()}
    ours, theirs = (adapter_of(folder) for folder in (soft, text))
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-5
    prefix, _, _ = train("prefix", *words, *where, "prefix", text=None)
    assert adapter_bytes(prefix) != adapter_bytes(soft)


def test_the_position_a_soft_prompt_was_trained_for_is_its_default(train, world):
    words = [*SOFT, world / "soft.safetensors", "--max-steps", 1]
    default, log, _ = train("default", *words, text=None)
    assert "prefix, from" in log and "note:" not in log
    prefix, _, _ = train("prefix", *words, "--preference-position", "prefix", text=None)
    behind, log, _ = train("behind", *words, "--preference-position", "before-response", text=None)
    assert "note: this soft prompt was trained for --preference-position prefix, and is used before-response" in log
    assert adapter_bytes(default) == adapter_bytes(prefix) != adapter_bytes(behind)


PATH = ["--prompt-embedding-path", "x"]
FLAG_MISTAKES = [
    ([], "there is no preference: give --preference-text"),
    (["--use-prompt-embedding"], "--use-prompt-embedding and --prompt-embedding-path PATH go together"),
    ([*PATH], "--use-prompt-embedding and --prompt-embedding-path PATH go together"),
    (["--preference-text", "T", *PATH], "--use-prompt-embedding and --prompt-embedding-path PATH go together"),
    (["--preference-text", "T", *SOFT, "x"], "--preference-text and --use-prompt-embedding are two ways"),
    (["--preference-text", "", *SOFT, "x"], "--preference-text and --use-prompt-embedding are two ways"),
    (["--preference-text", "T", "--preference-position", "prefix"], "prefix is not for a text: system or user"),
    ([*SOFT, "x", "--preference-position", "user"], "user is not for a soft prompt: prefix or before-response"),
    (["--preference-text", "T", "--alpha", "-1"], "--alpha: has to be at least 0"),
    (["--preference-text", "T", "--lambda-kl", "nan"], "--lambda-kl: has to be finite"),
    (["--preference-text", "T", "--teacher", "me"], "--teacher"),
    (
        ["--preference-text", "T", "--stop-at-gap", "--teacher", "policy"],
        "--stop-at-gap is --alpha times a pull to the reference: leave --teacher policy and --alpha 0 out",
    ),
    (["--preference-text", "T", "--stop-at-gap", "--alpha", 0], "leave --teacher policy and --alpha 0 out"),
]


@pytest.mark.parametrize("words, sentence", FLAG_MISTAKES)
def test_flags_that_cannot_be_meant(capsys, words, sentence):
    with pytest.raises(SystemExit) as ended:
        script.get_args(words)
    assert ended.value.code == 2
    assert sentence in one_line(capsys)


def no_user(folder):
    message = {"role": "assistant", "content": "a"}
    prompt = [message | {"role": "system"}, message | {"content": "c"}]  # an answer, and nothing that it answers
    row = {"prompt": prompt, "chosen": [message], "rejected": [message | {"content": "b"}]}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return ["--dataset-path", folder / "rows.jsonl", "--preference-text", "T", "--preference-position", "user"]


def evil(folder):
    torch.save({"weight": torch.ones(2, 32), "code": Code(folder / "trace")}, folder / "evil.pt")
    return [*SOFT, folder / "evil.pt"]


def wide(folder):
    save_file({"weight": torch.ones(2, 33)}, folder / "wide.safetensors")
    return [*SOFT, folder / "wide.safetensors"]


DATA_MISTAKES = {
    evil: "evil.pt holds more than tensors and was not run",
    wide: "2 vectors of width 33, and embeddings here have 32",
    no_user: "no message of a user to put the preference behind",
    lambda folder: [*SOFT, folder / "none.pt"]: "there is no soft prompt",
    lambda folder: ["--preference-text", "x" * 33]: "--preference-text has 33 tokens, beyond --max-prompt-length 32",
}


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_in_the_script_a_mistake_is_one_sentence_and_nothing_is_written(train, tmp_path, capsys, mistake):
    with pytest.raises(SystemExit) as ended:
        train("out", *mistake(tmp_path), text=None)
    assert ended.value.code == 2
    assert DATA_MISTAKES[mistake] in one_line(capsys)
    assert not (tmp_path / "out").exists() and not (tmp_path / "trace").exists()


# -- resume -----------------------------------------------------------------------------------------------------------


def test_resumed_behind_a_soft_prompt_is_uninterrupted(train, world, monkeypatch):
    words = ["--eval-samples", 4, "--epochs", 2, "--lora-dropout", 0.2, "--alpha", 1, "--logging-steps", 2]
    words += ["--save-steps", 100, *SOFT, world / "soft.safetensors"]
    whole, _, _ = train("whole", *words, text=None)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        ask_to_end(patch, 3)
        train("broken", *words, text=None)
    assert ended.value.code == 143
    resumed, log, _ = train("broken", *words, "--resume", "auto", text=None)
    assert f"resumed from {resumed / 'checkpoint-3'}" in log
    assert_same_files(resumed, whole)


def test_a_checkpoint_of_another_soft_prompt_is_refused(train, world, tmp_path, capsys):
    words = ["--eval-samples", 4, "--save-steps", 1, "--max-steps", 2]
    save_file({"weight": torch.ones(4, 32)}, tmp_path / "other.safetensors")
    train("out", *words, *SOFT, world / "soft.safetensors", text=None)
    with pytest.raises(SystemExit) as ended:
        other = [*SOFT, tmp_path / "other.safetensors", "--preference-position", "prefix"]
        train("out", *words, *other, "--resume", "auto", text=None)
    assert ended.value.code == 2 and "is of another run: preference" in one_line(capsys)


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_files_and_the_documented_loading_code(train, world):
    folder, log, _ = train("run", "--eval-samples", 4, "--save-merged")
    left = {path.name for path in folder.iterdir()}
    documented = (
        "adapter_config.json adapter_model.safetensors tokenizer.json trainer_state.json args.json metrics.jsonl"
    )
    assert left >= {*documented.split(), "README.md", "train_with_preference_prompt.py", "merged"}
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    args = json.loads((folder / "args.json").read_text())
    assert args["preference_text"] == TEXT and args["alpha"] == 0.1
    state = TrainerState.load_from_json(folder / "trainer_state.json")
    assert state.global_step == 3 and state.log_history == metrics_of(folder)
    ours = load_model(world / "model", torch.float32, "cpu")
    lora.load_adapter(ours, folder, "policy")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "model"), folder)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    ids = load_tokenizer(folder)("a0? abab", return_tensors="pt")["input_ids"]
    base = load_model(world / "model", torch.float32, "cpu")
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (ours, peft, merged, base)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-4, atol=1e-4)
    assert (logits[3] - logits[0]).abs().max() > 0.1
    assert "LoRA enabled for policy model:" in log and "Effective batch size: 8" in log


def test_tensorboard_has_the_documented_tags(train, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = ["--eval-samples", 4, "--report-to", "tensorboard", "--logging-dir", tmp_path / "events"]
    _, _, metrics = train("run", *words)
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    tags = """loss/train loss_components/dpo_loss loss_components/aligned_loss loss_components/kl_div
        rewards_train/accuracy preference_metrics/pref_advantage_ratio preference_metrics/pref_delta_chosen
        preference_metrics/pref_delta_rejected"""
    for tag in tags.split():
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in metrics if tag in line]
        assert logged == expected and len(logged) == 3
    (first, _) = events.Scalars("eval/preference_metrics/pref_advantage_ratio")
    assert first.value == pytest.approx(metrics[0]["eval_preference_metrics/pref_advantage_ratio"], rel=1e-6)


def test_documented_defaults():
    args = script.get_args(["--preference-text", ""])  # an empty text is a preference: none
    documented = dict(model="Qwen/Qwen2.5-1.5B-Instruct", alpha=0.1, beta=0.05, lambda_kl=0.1, learning_rate=5e-4)
    documented |= dict(epochs=1, batch_size=1, gradient_accumulation_steps=512, lora_r=16, lora_alpha=32, num_samples=0)
    documented |= dict(
        lora_dropout=0.1, max_length=300, max_prompt_length=128, teacher="policy", stop_at_gap=False, nll_coeff=0
    )
    documented |= dict(output_dir="model_output/Preference_Guided_DPO", logging_dir="logs/Preference_Guided_DPO")
    assert {name: getattr(args, name) for name in documented} == documented
    args = script.get_args(["--model", "toy", "--preference-text", "T", "--dataset-path", "x"])
    assert (args.dataset_path, args.test_dataset_path) == ("x", "toy")
