"""The scripts beside dpo_hf_run.py on pairs with pictures, end to end: a tiny LLaVA with its processor, and files."""

import base64
import importlib
import io
import json
import shutil
from functools import partial

import pytest
import torch
from PIL import Image
from ranks import run_ranks
from runs import adapter_of, metrics_of, one_line, run_script
from tiny_llava import assert_same_adapter, reader_of, row, write_seen
from tiny_vision import IMAGE
from transformers import AutoModelForImageTextToText, AutoProcessor
from worlds import write_rows

import evaluate_alignment
import generate
import lora
import train_rm
import train_safe_mm_dpo
import train_with_preference_prompt
from formats.model_files import load_model, load_tokenizer
from harness import toys
from packed_model import prepare_scores
from packing import pack
from preference_data import load_pairs
from preference_prompt import with_text
from sampling import end_tokens

SMALL = "--dtype fp32 --device cpu --report-to none --logging-steps 1 --learning-rate 1e-2 --seed 1 --lora-r 4".split()
SMALL += "--max-length 64 --max-prompt-length 48 --batch-size 2 --gradient-accumulation-steps 2".split()
HARMFUL = {"safety_labels": {"chosen": -1, "rejected": 1}}


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A folder with a model and pairs of both kinds, and both reward models trained on them."""
    folder = write_seen(tmp_path_factory.mktemp("pictured"))
    write_rows(folder / "helpful.jsonl", [row(number) for number in range(16)])
    turned = [row(number) | HARMFUL for number in range(16)]
    turned = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in turned]
    write_rows(folder / "harmless.jsonl", turned)
    for task in ("helpful", "harmless"):
        run_script([*rm_words(folder, task), "--output-dir", folder / f"{task}_rm", "--epochs", 3], train_rm)
    return folder


def rm_words(folder, task):
    data = [word for part in ("train", "val") for word in (f"--{part}-{task}-path", folder / f"{task}.jsonl")]
    return ["--task", task, "--model", folder / "model", *data, "--lora-dropout", 0, *SMALL]


def safe_words(folder, out, *more):
    words = ["--model", folder / "model", "--output-dir", out, "--lora-dropout", 0, "--cost-every", 1, *SMALL]
    for task in ("helpful", "harmless"):
        words += [f"--{task}-rm-path", folder / f"{task}_rm", f"--train-{task}-path", folder / f"{task}.jsonl"]
    return [*words, "--eval-samples", 0, "--epochs", 1, "--own-pairs", 0.5, "--max-length", 56, *more]


# -- reward models ---------------------------------------------------------------------------------------------------


def test_a_reward_model_learns_from_pictures_and_is_calibrated(pictured):
    record = json.loads((pictured / "harmless_rm/reward_model.json").read_text())
    assert record["calibrated"] is True and len(record["pictures"]) == 64
    losses = [line["loss"] for line in metrics_of(pictured / "harmless_rm") if "loss" in line]
    assert losses[0] == pytest.approx(3 * 0.6931, abs=1e-3)  # ranking, and the label of each side
    assert losses[-1] < 0.5 * losses[0]
    assert AutoProcessor.from_pretrained(pictured / "harmless_rm").image_token == "<image>"


def test_peft_on_transformers_own_model_gives_its_scores(pictured):
    """From pixels, one whole sequence at a time: the head of the file on the last hidden state."""
    import peft

    tokenizer, reader = reader_of(pictured)
    pairs, _ = load_pairs(str(pictured / "helpful.jsonl"), tokenizer, 64, 48, reader=reader)
    ours = load_model(str(pictured / "model"), torch.float32, "cpu", scores=True)
    _, head = lora.load_adapter(ours, pictured / "helpful_rm", "reward", with_head=True)
    prepare_scores(ours, pack(pairs[:1]))
    with torch.no_grad():
        got = torch.stack(ours.packed_scores(pack(pairs), head))
    base = AutoModelForImageTextToText.from_pretrained(pictured / "model")
    theirs = peft.PeftModel.from_pretrained(base, pictured / "helpful_rm").base_model.model.model.eval()
    processor = AutoProcessor.from_pretrained(pictured / "model")
    for place, pair in enumerate(pairs):
        given = {}
        prompt = pair.prompt_ids
        if pair.pictures:
            images = [Image.open(path).convert("RGB") for path in pair.pictures.sources]
            made = processor(text=[pair.pictures.text], images=[images], add_special_tokens=False, return_tensors="pt")
            prompt, given = made["input_ids"][0].tolist(), {"pixel_values": made["pixel_values"]}
        for side, response in enumerate(pair[1:3]):
            with torch.no_grad():
                states = theirs(input_ids=torch.tensor([prompt + response]), **given).last_hidden_state
            assert got[side, place].item() == pytest.approx((states[0, -1] @ head[0]).item(), abs=1e-4)


def test_a_reward_model_of_pictures_made_otherwise_is_refused(pictured, tmp_path, capsys):
    shutil.copytree(pictured / "model", tmp_path / "model")
    for path in (tmp_path / "model").glob("*processor_config.json"):
        path.write_text(path.read_text().replace("0.48145466", "0.3"))
    words = safe_words(pictured, tmp_path / "out", "--model", tmp_path / "model")
    with pytest.raises(SystemExit) as end:
        run_script(words, train_safe_mm_dpo)
    assert end.value.code == 2
    assert "_rm was trained on pictures as another processor makes them: train it on --model" in one_line(capsys)


# -- Safe-MM-DPO -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def safe(pictured, tmp_path_factory):
    out = tmp_path_factory.mktemp("safe") / "out"
    run_script(safe_words(pictured, out, "--save-steps", 3), train_safe_mm_dpo)
    return out


def test_own_pairs_are_of_answers_to_pictures(pictured, safe):
    costs = [line["E_cost"] for line in metrics_of(safe) if "loss_H" in line]
    assert len(costs) == 4 == len(set(costs))
    state = json.loads((safe / "checkpoint-3/state.json").read_text())
    rows = find(state, "own_pairs")["rows"]
    assert rows and any(row[7:] for row in rows) and all(IMAGE not in row[1] + row[2] for row in rows)
    assert all(".language_model." in name for name in adapter_of(safe))


def find(state, name):
    return state[name] if name in state else next(find(part, name) for part in state.values() if isinstance(part, dict))


def test_a_run_with_own_pairs_of_pictures_goes_on_to_the_same_bits(pictured, safe, tmp_path):
    shutil.copytree(safe / "checkpoint-3", tmp_path / "again/checkpoint-3")
    run_script([*safe_words(pictured, tmp_path / "again", "--save-steps", 3), "--resume", "auto"], train_safe_mm_dpo)
    assert_same_adapter(safe, tmp_path / "again")


def test_two_ranks_sample_and_learn_as_one_process(pictured, safe, tmp_path):
    words = safe_words(pictured, tmp_path / "out", "--gradient-accumulation-steps", 1)
    codes, said = run_ranks("train_safe_mm_dpo", words, 2, tmp_path / "log")
    assert codes == [0, 0], said
    costs = [[line["E_cost"] for line in metrics_of(out) if "E_cost" in line] for out in (safe, tmp_path / "out")]
    assert costs[1] == pytest.approx(costs[0], abs=1e-4)
    assert_same_adapter(safe, tmp_path / "out", 1e-3)


# -- preference prompts ------------------------------------------------------------------------------------------------


def test_a_preference_in_words_stands_beside_the_picture(pictured, tmp_path, capsys):
    tokenizer, reader = reader_of(pictured)
    prefer = partial(with_text, text="Be", position="system")
    pairs, _ = load_pairs(str(pictured / "helpful.jsonl"), tokenizer, 64, 48, reader=reader, prefer=prefer)
    for pair in pairs:
        if pair.pictures:
            ids, given = pair.prompted_pictures.open()
            assert ids == pair.prompted_ids and tokenizer.decode(ids).startswith("<|im_start|>system\nBe<|im_end|>")
            assert torch.equal(given["pixel_values"], pair.pictures.open()[1]["pixel_values"])
        assert len(pair.prompted_ids) > len(pair.prompt_ids)
    data = ["--dataset-path", pictured / "helpful.jsonl", "--eval-samples", 2, "--epochs", 1]
    words = ["--model", pictured / "model", *data, "--preference-text", "Be", *SMALL, "--output-dir", tmp_path / "out"]
    run_script(words, train_with_preference_prompt)
    assert "tokens with the preference" in capsys.readouterr().out
    assert metrics_of(tmp_path / "out")[-1]["epoch"] == 1


@pytest.mark.parametrize("script", ["learn_prompt", "train_with_preference_prompt"])
def test_a_soft_prompt_is_refused_beside_pictures(pictured, tmp_path, capsys, script):
    words = ["--model", pictured / "model", "--dataset-path", pictured / "helpful.jsonl", "--device", "cpu"]
    words += ["--max-length", 64, "--max-prompt-length", 48, "--output-dir", tmp_path / "out"]
    if script == "train_with_preference_prompt":
        torch.save(torch.zeros(2, 32), tmp_path / "soft.pt")
        words += ["--use-prompt-embedding", "--prompt-embedding-path", tmp_path / "soft.pt"]
    else:
        words += ["--num-virtual-tokens", 2, "--prompt-init", "vocab"]
    with pytest.raises(SystemExit) as end:
        run_script(words, importlib.import_module(script))
    assert end.value.code == 2
    assert "helpful.jsonl:1 has a picture, and a soft prompt goes with text alone" in one_line(capsys)


# -- answers and their report ------------------------------------------------------------------------------------------


FP32 = "--dtype", "fp32", "--device", "cpu"


def test_answers_are_the_models_own_and_their_rows_name_the_pictures(pictured, tmp_path):
    """Against transformers' own generate, from the processor's pixels; a row without a picture is a message too."""
    output = tmp_path / "made/out.jsonl"
    words = ["--model", pictured / "model", "--prompts", pictured / "helpful.jsonl", "--temperature", 0, *FP32]
    run_script([*words, "--max-new-tokens", 5, "--output", output], generate)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 16 and "images" not in rows[3]
    model = AutoModelForImageTextToText.from_pretrained(pictured / "model")
    processor = AutoProcessor.from_pretrained(pictured / "model")
    tokenizer = load_tokenizer(str(pictured / "model"))
    for place in (0, 2, 3):
        paths = [output.parent / name for name in rows[place].get("images", [])]
        parts = [{"type": "image"}] * len(paths) + [{"type": "text", "text": rows[place]["prompt"]}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        images = [[Image.open(path).convert("RGB") for path in paths]] if paths else None
        given = processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
        settings = dict(do_sample=False, suppress_tokens=[IMAGE], eos_token_id=end_tokens(model, tokenizer))
        said = model.generate(**given, max_new_tokens=5, **settings)[0, given["input_ids"].shape[1] :]
        assert rows[place]["response"] == tokenizer.decode(said, skip_special_tokens=True)


def test_best_against_worst_are_pairs_with_pictures(pictured, tmp_path):
    output = tmp_path / "pairs.jsonl"
    words = [
        "--model",
        pictured / "model",
        "--prompts",
        pictured / "helpful.jsonl",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    words += ["--max-new-tokens", 4, "--num-responses", 3, "--reward-model", pictured / "helpful_rm", "--pairs"]
    run_script([*words, "--output", output], generate)
    tokenizer, reader = reader_of(pictured)
    pairs, _ = load_pairs(str(output), tokenizer, 64, 48, reader=reader, skip_invalid=True)
    assert sum(bool(pair.pictures) for pair in pairs) >= 8


def test_pictures_given_as_bytes_cannot_be_written_into_rows(pictured, tmp_path, capsys, monkeypatch):
    data = (pictured / "pictures/1.png").read_bytes()
    monkeypatch.setattr("tools.prompts.read_rows", lambda _: [("prompts:1", {"prompt": "what?", "image": data})])
    words = [
        "--model",
        pictured / "model",
        "--prompts",
        "prompts",
        "--output",
        tmp_path / "out.jsonl",
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit) as end:
        run_script(words, generate)
    assert end.value.code == 2
    assert "prompts:1: its picture is bytes, which rows out cannot hold" in one_line(capsys)


def test_a_report_shows_the_pictures_of_its_samples(pictured, safe, tmp_path):
    shown = [str(pictured / f"pictures/{number}.png") for number in range(4)]
    rows = [{"prompt": f"what {n}?", "category": "seen", "image": path} for n, path in enumerate(shown)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    words = [
        "--prompts",
        prompts,
        "--adapters",
        f"safe={safe}",
        "--max-new-tokens",
        4,
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    judges = ["--helpful-rm-path", pictured / "helpful_rm", "--harmless-rm-path", pictured / "harmless_rm"]
    run_script([*words, *judges, "--output-dir", tmp_path / "report"], evaluate_alignment)
    report = json.loads((tmp_path / "report/report.json").read_text())
    for sample in report["samples"]:
        (uri,) = sample["pictures"]
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))
        number = int(sample["rows"]["base"]["prompt"].split()[1].strip("?"))
        assert image.tobytes() == Image.open(shown[number]).convert("RGB").tobytes()
    page = (tmp_path / "report/report.html").read_text()
    assert page.count('<img class="picture" src="data:image/png;base64,') == 4 and "img-src data:" in page


# -- the toy world by name ---------------------------------------------------------------------------------------------


def test_toy_vision_names_a_model_and_its_files(pictured, tmp_path, monkeypatch, capsys):
    for part in ("train", "val"):
        (tmp_path / "world" / part).mkdir(parents=True)
        rows = [row(n) | {"image": str(pictured / f"pictures/{n}.png")} for n in (0, 1, 4, 5)]
        write_rows(tmp_path / "world" / part / "helpful_pairs.jsonl", rows)
    shutil.copytree(pictured / "model", tmp_path / "world/model")
    monkeypatch.setattr(toys, "build", lambda world: tmp_path / {"toy-vision": "world"}[world])
    words = ["--task", "helpful", "--model", "toy-vision", *SMALL, "--output-dir", tmp_path / "out"]
    run_script(words, train_rm)
    assert json.loads((tmp_path / "out/reward_model.json").read_text())["base_model"] == str(tmp_path / "world/model")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_script(["--model", "toy-vision", "--preference-text", "Be"], train_with_preference_prompt)
    assert end.value.code == 2
    said = one_line(capsys)
    assert "--dataset-path toy-vision: that world has no train/polite_pairs.jsonl: name a file of yours" in said
