"""Records of adapters, reward models and unfinished outputs, and prompts, with one thing changed: refused in one
sentence, or read as one would who has not read our code.
"""

import argparse
import copy
import json
import math
import random
import shutil

import pytest
import torch
from campaigns import SEED
from mutations import mutated
from safetensors.torch import load_file
from worlds import CHATML, char_tokenizer, make_adapter

import lora
import reward_models
from formats.model_files import load_model, load_tokenizer
from harness import endings
from tools import generate_prompts, generate_rows
from tools.generate_output import BatchFile

CASES = 550  # of each kind of file


def campaign(tally, kind, value, path, use, plainly):
    """Write `value` with one thing changed to `path`; use() has to fail with a sentence or to give what plainly(what
    stands in the file) gives, which fails at what is odd."""
    for case in range(CASES):
        draw = random.Random(f"{SEED} {kind} {case}")
        content, what = mutated(value, draw) if case % 50 else (json.dumps(value).encode(), "nothing")
        path.write_bytes(content)
        where = f"case {case}, {what}: {content[-400:]}"
        try:
            found = use()
        except Exception as error:
            sentence = endings.sentence_of(error)
            tally.count("refused")
            if sentence is None or what == "nothing":
                tally.fail(f"{where}\n{type(error).__name__}: {error}")
            continue
        try:
            expected = plainly(json.loads(content))
        except Exception as error:
            tally.fail(f"{where}\nread, and plainly not: {type(error).__name__}: {error}")
            continue
        if found == expected:
            tally.count("read")
        else:
            tally.fail(f"{where}\nread as {found}, plainly {expected}")
    tally.done()


def test_adapters(world, tmp_path, tally):
    make_adapter(world / "model", tmp_path)
    model = load_model(str(world / "model"), torch.float32, "cpu")
    path, state = tmp_path / "adapter_config.json", load_file(tmp_path / "adapter_model.safetensors")
    ids = torch.tensor([[70, 80, 90, 100]])

    @torch.no_grad()
    def logits(of):
        return [round(number, 2) for number in of(input_ids=ids).logits[0, -1, ::16].tolist()]

    def use():
        with_adapter = copy.deepcopy(model)
        lora.load_adapter(with_adapter, tmp_path, "policy")
        return logits(with_adapter)

    @torch.no_grad()
    def plainly(config):
        assert config["peft_type"] == "LORA"
        scale = config.get("lora_alpha", 8) / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        merged = copy.deepcopy(model)
        for key, down in state.items():
            if ".lora_A." in key:
                name = key.removeprefix("base_model.model.").replace(".lora_A.weight", "")
                merged.get_submodule(name).weight += scale * state[key.replace("lora_A", "lora_B")] @ down
        return logits(merged)

    campaign(tally, "adapters", json.loads(path.read_text()), path, use, plainly)


def test_reward_models(labelled_world, tmp_path, tally):
    folder = shutil.copytree(labelled_world / "harmless", tmp_path / "rm")
    (folder / "manifest.json").unlink()  # nothing says what it was
    path, tokenizer = folder / "reward_model.json", load_tokenizer(str(labelled_world / "model"))
    value = json.loads(path.read_text())
    scores = torch.tensor([[1.0, 2.0], [2.0, -1.0]])  # too few of either kind for a mean of theirs
    numbers = dict.fromkeys(("loss", "score_std"), 0.5) | {"safe_score": 1.0, "harmful_score": -1.5}
    value |= {"task": "harmless", "calibrated": True, "validation": numbers}

    def use():
        record = reward_models.read_record(folder, "harmless", tokenizer)
        args = argparse.Namespace(cost_threshold="auto", harm_rate=None, score_units="spread")
        reward_models.check_threshold(args, record)
        unit = reward_models.cost_unit({"harmless": record}, {"harmless": folder}, args)
        return record["base_sha256"], reward_models.threshold(args, record, unit, scores, "the policy's own")[0]

    def plainly(record):
        assert record["task"] == "harmless"
        numbers = record["validation"]
        assert type(record["calibrated"]) is bool
        apart = numbers["safe_score"] - numbers["harmful_score"] if numbers.keys() >= reward_models.APART else 0
        spread = apart if apart > 0 else numbers["score_std"]
        assert spread > 0
        if record["calibrated"]:
            safe, harmful = -numbers["safe_score"], -numbers["harmful_score"]
            threshold = (safe + 0.05 * (harmful - safe)) / spread
        else:
            threshold = -2.0 / spread  # the cheaper of two responses
        assert math.isfinite(threshold)
        return record["base_sha256"], threshold

    campaign(tally, "reward models", value, path, use, plainly)


@pytest.mark.parametrize("kind", ["texts", "messages"])
def test_prompts(kind, tmp_path, tally):
    prompt = "How now? " if kind == "texts" else [{"role": "user", "content": "How"}]
    value = {"prompt": prompt, "category": "theft", "n": 5}
    path, tokenizer = tmp_path / "prompts.jsonl", char_tokenizer(template=CHATML)
    args = argparse.Namespace(prompts=str(path), num_samples=0, max_prompt_length=256, chat_template_strings=False)

    def use():
        return [(prompt.prompt, prompt.ids[-9:]) for prompt in generate_prompts.read(args, tokenizer).prompts]

    def as_ids(text):
        return [code if code in (10, *range(32, 127)) else 4 for code in map(ord, text)][-9:]  # 4: unknown

    def plainly(row):
        if isinstance(row["prompt"], str):
            return [(row["prompt"], as_ids(row["prompt"]) or [1])]  # 1: the end of a text before
        messages = [{key: value for key, value in message.items() if value is not None} for message in row["prompt"]]
        assert messages and all(m["role"] in ("system", "user", "assistant") for m in messages)
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = "".join(part["text"] for part in message["content"])
            assert isinstance(message["content"], str)
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        return [(messages, as_ids(f"assistant\n{begun}"))]

    campaign(tally, f"prompts {kind}", value, path, use, plainly)


def test_unfinished_outputs(tmp_path, tally):
    """What a record counts decides which rows come next."""
    decide = "batches", "bytes", "responses"
    path, identity = tmp_path / "rows.jsonl", {"--seed": 42, "--top-p": 1.0, "prompts": "ab12", "reward": None}
    output = BatchFile(path)
    progress = output.begin(identity) | dict.fromkeys(generate_rows.COUNTS, 0)
    for number in range(3):
        progress.update(prompts=2 * number + 2, responses=2 * number + 2, tokens=9 * number + 9, rows=2 * number + 2)
        output.write([{"prompt": f"q{number}", "response": str(n)} for n in (1, 2)], progress, finished=False)
    record, rows = output.record, path.read_bytes()
    value = json.loads(record.read_text())

    def use():
        path.write_bytes(rows + b'{"half a row')
        again = BatchFile(path)
        again.check_place()
        found = dict.fromkeys(generate_rows.COUNTS, 0) | again.begin(identity)
        numbers = all(type(found[name]) in (int, float) for name in generate_rows.COUNTS)
        return [found[name] for name in decide], numbers, path.read_bytes()

    def plainly(content):
        return [value["progress"][name] for name in decide], True, rows

    campaign(tally, "records", value, record, use, plainly)
