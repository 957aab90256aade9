"""A lesson is the oracle of its script: the same rows, the same draws, and two programs that share no line.

Each script is run from outside, through its flags.  Its losses stand in metrics.jsonl, and its gradients in the first
moment of AdamW, which after one update is a tenth of the gradient.  The first gradients are what is compared to many
digits: later, AdamW makes a whole step of a gradient that is nothing but rounding.
"""

import ast
import importlib.util
import json
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from helpers import ROOT
from processes import environment, run_program
from runs import run_script
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import lora
import reward_models
import train_rm
import train_safe_mm_dpo
import train_with_preference_prompt
from formats.model_files import load_model
from packing import epoch_plan

LESSONS = sorted(path.stem for path in (ROOT / "lessons").glob("*.py"))
UPDATES, PAIRS, SEED = 20, 4, 42
FLAGS = f"""--max-steps {UPDATES} --batch-size 2 --gradient-accumulation-steps 2 --seed {SEED} --lr-scheduler constant
    --max-grad-norm 0 --dtype fp32 --device cpu --eval-samples 0 --report-to none
    --logging-steps 1 --save-steps 1""".split()


def lesson_named(name, learning_rate):
    """A lesson as a module, with the settings of this test, and the flags that give its script the same."""
    spec = importlib.util.spec_from_file_location(f"lesson_{name}", ROOT / "lessons" / f"{name}.py")
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    lesson.PAIRS_PER_UPDATE, lesson.LEARNING_RATE = PAIRS, learning_rate
    return lesson, [*FLAGS, "--learning-rate", learning_rate]


def first_rows(source, count, folder):
    """A file with the first rows of another."""
    lines = source.read_text("utf-8").splitlines(keepends=True)[:count]
    target = folder / source.name
    target.write_text("".join(lines), "utf-8")
    return target


def in_the_order_of_the_script(rows):
    plan = epoch_plan(range(len(rows)), 0, SEED, batch_size=2, accumulation=2, ranks=1)
    return [rows[i] for _, ranks in plan for micro_batch in ranks[0] for i in micro_batch]


def logged(folder, *names):
    """Of each update the numbers with these names in metrics.jsonl."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [tuple(entry[name] for name in names) for entry in entries if names[0] in entry]


def gradients(folder, step):
    """The gradients of an update, from AdamW's average of them: m_n = 0.9 m_(n-1) + 0.1 g_n."""

    def averages(step):
        tensors = load_file(folder / f"checkpoint-{step}" / "training.safetensors")
        count = sum(name.endswith(".exp_avg") for name in tensors)
        return [tensors[f"optimizer.{n}.exp_avg"].double() for n in range(count)]

    before = averages(step - 1) if step > 1 else [0.0] * len(averages(1))
    return [(after - 0.9 * earlier) / 0.1 for after, earlier in zip(averages(step), before)]


def assert_gradients_agree(script, lesson, absolute, relative):
    """Of every tensor; relative: to the largest number of the tensor."""
    assert len(script) == len(lesson)
    for n, (one, other) in enumerate(zip(script, lesson)):
        error = (one.reshape(other.shape) - other).abs().max().item()
        assert error <= absolute, f"tensor {n}"
        assert error <= relative * other.abs().max().item(), f"tensor {n}"


def causal_models(toy):
    """(policy, frozen reference)."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32) for _ in range(2))
    return policy, reference.requires_grad_(False)


# -- lesson and script ------------------------------------------------------------------------------------------------


def test_dpo(toy, tmp_path):
    data = first_rows(toy / "train/helpful_pairs.jsonl", UPDATES * PAIRS, tmp_path)
    lesson, flags = lesson_named("dpo", learning_rate=1e-3)
    lesson.BETA = 0.7
    words = ["--model", toy / "model", "--dataset", data, "--beta", lesson.BETA, *flags]
    run_script([*words, "--output-dir", tmp_path / "run"])
    pairs = in_the_order_of_the_script(lesson.read_pairs(data, AutoTokenizer.from_pretrained(toy / "model")))

    def learn(updates):
        policy, reference = causal_models(toy)
        torch.manual_seed(SEED)
        parameters = lesson.add_lora(policy)
        history = lesson.train(policy, reference, parameters, pairs[: updates * PAIRS])
        return history, [parameter.grad for parameter in parameters]

    history, _ = learn(UPDATES)
    assert history[0][0] == pytest.approx(0.693147, abs=1e-5)
    assert history[-1][0] < 0.6
    names = "loss", "logps/chosen_change", "logps/rejected_change"
    for ours, theirs in zip(history, logged(tmp_path / "run", *names), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert_gradients_agree(gradients(tmp_path / "run", 1), learn(1)[1], 1e-5, 1e-4)
    # A's first ones are zero, as B is.
    assert_gradients_agree(gradients(tmp_path / "run", 2), learn(2)[1], 1e-4, 1e-3)


def test_reward_model(toy, tmp_path):
    data = first_rows(toy / "train/harmless_pairs.jsonl", UPDATES * PAIRS, tmp_path)
    lesson, flags = lesson_named("reward_model", learning_rate=1e-3)
    lesson.LABEL_WEIGHT = 0.6
    words = ["--task", "harmless", "--model", toy / "model", "--train-harmless-path", data, "--lora-dropout", 0]
    words += ["--classification-loss-weight", lesson.LABEL_WEIGHT, *flags]
    run_script([*words, "--output-dir", tmp_path / "run"], train_rm)
    pairs = in_the_order_of_the_script(lesson.read_pairs(data, AutoTokenizer.from_pretrained(toy / "model")))

    def learn(updates):
        model = AutoModel.from_pretrained(toy / "model", dtype=torch.float32)
        torch.manual_seed(SEED)
        head = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
        parameters = [*lesson.add_lora(model), head]
        losses = lesson.train(model, head, parameters, pairs[: updates * PAIRS])
        return losses, [parameter.grad for parameter in parameters]

    losses, _ = learn(UPDATES)
    assert losses[0] == pytest.approx(2.2 * 0.693147, abs=1e-5)
    assert losses == pytest.approx([loss for (loss,) in logged(tmp_path / "run", "loss")], abs=1e-4)
    assert_gradients_agree(gradients(tmp_path / "run", 1), learn(1)[1], 1e-5, 1e-4)
    assert_gradients_agree(
        gradients(tmp_path / "run", 2), learn(2)[1], 1e-4, 1e-3
    )  # the first of all but the head are zero


def save_cost_model(folder, toy, tokenizer, cost_head):
    """The lesson's cost model as a folder of train_rm.py: an adapter that changes nothing, and the head of scores."""
    model = load_model(str(toy / "model"), torch.float32, "cpu", scores=True)
    lora.add_adapter(model, "reward", r=1, alpha=1)
    lora.save_adapter(model, "reward", folder, str(toy / "model"), -cost_head[None])
    tokenizer.save_pretrained(folder)
    record = {"task": "harmless", "calibrated": True, "base_model": str(toy / "model"), "base_sha256": "another"}
    record |= {"validation": {}, "sha256": reward_models.files_sha256(folder)}
    (folder / "reward_model.json").write_text(json.dumps(record), "utf-8")


def test_safe_dpo(toy, tmp_path):
    half = UPDATES * PAIRS // 2
    helpful = first_rows(toy / "train/helpful_pairs.jsonl", half, tmp_path)
    harmless = first_rows(toy / "train/harmless_pairs.jsonl", half, tmp_path)
    lesson, flags = lesson_named("safe_dpo", learning_rate=1e-4)
    lesson.SEED = SEED * 1_000_003  # whence the script counts
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    rows = lesson.read_rows(helpful, tokenizer) + lesson.read_rows(harmless, tokenizer)
    prompts = [list(ids) for ids in dict.fromkeys(tuple(prompt) for _, prompt, *_ in rows[half:])]
    _, reference = causal_models(toy)
    cost_head = lesson.fit_cost(reference, rows[half:])
    save_cost_model(tmp_path / "rm", toy, tokenizer, cost_head)
    words = ["--model", toy / "model", "--train-helpful-path", helpful, "--train-harmless-path", harmless]
    words += ["--harmless-rm-path", tmp_path / "rm", "--lora-r", 0, "--w", 0, "--kl-coeff", 0, "--beta", lesson.BETA]
    words += ["--score-units", "raw", "--cost-threshold", lesson.THRESHOLD, "--cost-every", lesson.COST_EVERY]
    words += ["--lambda-lr", lesson.LAMBDA_RATE, "--lambda-max", lesson.LAMBDA_MAX]
    words += ["--max-length", 2 * lesson.MAX_TOKENS, "--max-prompt-length", lesson.MAX_TOKENS, *flags]
    run_script([*words, "--output-dir", tmp_path / "run"], train_safe_mm_dpo)
    rows = in_the_order_of_the_script(rows)

    def learn(updates):
        policy, _ = causal_models(toy)
        history = lesson.train(policy, reference, cost_head, rows[: updates * PAIRS], prompts, tokenizer.eos_token_id)
        return history, [parameter.grad for parameter in policy.parameters()]

    history, _ = learn(UPDATES)
    names = "loss_H", "loss_S", "E_cost", "lambda"
    for ours, theirs in zip(history, logged(tmp_path / "run", *names), strict=True):
        assert ours == pytest.approx([number or 0.0 for number in theirs], abs=1e-4)  # None: no row of that kind
    assert_gradients_agree(gradients(tmp_path / "run", 1), learn(1)[1], 1e-5, 1e-4)


def test_preference_prompt(toy, tmp_path):
    data = first_rows(toy / "train/polite_pairs.jsonl", UPDATES * PAIRS, tmp_path)
    lesson, flags = lesson_named("preference_prompt", learning_rate=1e-4)
    words = ["--model", toy / "model", "--dataset-path", data, "--preference-text", lesson.PREFERENCE, "--lora-r", 0]
    words += ["--beta", lesson.BETA, "--alpha", lesson.PULL, "--lambda-kl", lesson.KL_WEIGHT, *flags]
    run_script([*words, "--output-dir", tmp_path / "run"], train_with_preference_prompt)
    pairs = in_the_order_of_the_script(lesson.read_pairs(data, AutoTokenizer.from_pretrained(toy / "model")))

    def learn(updates):
        policy, reference = causal_models(toy)
        history = lesson.train(policy, reference, pairs[: updates * PAIRS])
        return history, [parameter.grad for parameter in policy.parameters()]

    history, _ = learn(UPDATES)
    advantage = "preference_metrics/log_pref_advantage"  # m_p - m
    for (loss, m, m_p, _), theirs in zip(history, logged(tmp_path / "run", "loss", advantage), strict=True):
        assert (loss, m_p - m) == pytest.approx(theirs, abs=1e-4)
    assert_gradients_agree(gradients(tmp_path / "run", 1), learn(1)[1], 1e-5, 1e-4)


# -- lessons as files -------------------------------------------------------------------------------------------------


def test_there_are_four():
    assert LESSONS == ["dpo", "preference_prompt", "reward_model", "safe_dpo"]


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_imports_nothing_of_ours(name):
    text = (ROOT / "lessons" / f"{name}.py").read_text("utf-8")
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    assert modules - {"torch", "transformers"} <= sys.stdlib_module_names
    assert {"torch", "transformers"} <= modules
    assert 80 <= len(text.splitlines()) <= 150


@pytest.fixture(scope="module")
def small_world(toy, tmp_path_factory):
    """The toy world with few rows."""
    world = tmp_path_factory.mktemp("small") / "world"
    for part, count in (("train", 40), ("test", 6)):
        (world / part).mkdir(parents=True)
        for path in (toy / part).glob("*.jsonl"):
            first_rows(path, count, world / part)
    (world / "model").symlink_to(toy / "model")
    return world


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_alone_draws_and_answers(name, small_world, tmp_path):
    """Copied out of the project, with few updates."""
    text = (ROOT / "lessons" / f"{name}.py").read_text("utf-8")
    text, replaced = re.subn(r"^(UPDATES, PAIRS_PER_UPDATE) = .*", r"\1 = 3, 4", text, flags=re.MULTILINE)
    assert replaced == 1
    (tmp_path / f"{name}.py").write_text(text, "utf-8")
    done = run_program([sys.executable, f"{name}.py", small_world], cwd=tmp_path, env=environment(PYTHONPATH=""))
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^update \d+ loss", done.stdout, re.MULTILINE)) == 3
    answers = re.findall(r"^  (before|after).*?: (.*)", done.stdout, re.MULTILINE)
    assert [when for when, _ in answers] == ["before", "after"] * 3
    assert all(len(said.split()) > 3 for _, said in answers)
    check_picture(small_world / f"{name}.svg", name)


def check_picture(path, name):
    """What a lesson draws: lines, one for each quantity, or bars, all of them within the frame."""
    picture = ElementTree.parse(path).getroot()
    _, _, width, height = map(float, picture.get("viewBox").split())
    shapes = {element.tag.rpartition("}")[2] for element in picture}
    assert shapes >= ({"rect", "text", "path"} if name == "reward_model" else {"polyline", "text"})
    for line in picture.iterfind("{*}polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


@pytest.mark.parametrize("name", LESSONS)
def test_the_pages_show_the_picture_of_each_lesson(name):
    check_picture(ROOT / f"lessons/{name}.svg", name)
    for page in ("README.md", "README.zh.md"):
        assert f"]({name}.svg)" in (ROOT / "lessons" / page).read_text("utf-8")
