"""What tests write for a script to read: tokenizers, rows, models, adapters, reward models; and broken models."""

import json
import os
import pickle
import random

import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomize, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import lora
from formats.model_files import load_model, load_tokenizer
from harness import score_cache
from preference_data import load_pairs
from train_rm import save_model

SPECIAL = {"<s>": 0, "</s>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "<unk>": 4}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def char_tokenizer(merges=(), eos="</s>", before="", after="", template=None, more=None):
    """Every character is a token and its id is its ASCII number; merge n becomes token 128 + n.

    `before` and `after` are the special tokens that the tokenizer writes around a text by itself.  more: {token:
    id} of further ones.
    """
    more = more or {}
    vocab = SPECIAL | more | {"\n": 10} | {chr(code): code for code in range(32, 127)}
    vocab |= {first + second: 128 + n for n, (first, second) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]+"), "isolated")
    backend.decoder = decoders.Fuse()
    names = {"eos_token": eos, "unk_token": "<unk>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *more]}
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[(t, SPECIAL[t]) for t in (before, after) if t]
        )
    if before:
        names["bos_token"] = before
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def ids(text):
    """What char_tokenizer gives a text: written out by hand, so that the tests do not ask the tokenizer."""
    return [ord(character) for character in text]


def write_rows(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8", "surrogateescape"
    )
    return path


def strings(number):
    return {"prompt": f"q{number}", "chosen": f" yes {number}", "rejected": f" no {number}"}


def load(path, tokenizer=None, max_length=512, max_prompt_length=256, **options):
    return load_pairs(str(path), tokenizer or char_tokenizer(), max_length, max_prompt_length, **options)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def write_world(folder):
    """A model folder (Qwen3, 128 tokens, 2 layers; ids are ASCII numbers) and 24 pairs about 24 prompts."""
    tokenizer = char_tokenizer(template=CHATML)
    tokenizer.save_pretrained(folder / "model")
    write_model(folder / "model", seed=0)
    rows = [
        {"prompt": f"{chr(97 + n)}{n}? ", "chosen": "ab" * (n % 5 + 1), "rejected": "cd" * (n % 4 + 1)}
        for n in range(24)
    ]
    write_rows(folder / "pairs.jsonl", rows)
    return folder


def write_model(folder, seed, **changes):
    """A random model without its tokenizer."""
    tiny_model("qwen3", seed=seed, **dict(vocab_size=128) | changes).save_pretrained(folder)
    return folder


QUICK = """--dtype fp32 --device cpu --report-to none --logging-steps 1 --learning-rate 1e-4
    --max-length 64 --max-prompt-length 32 --epochs 2""".split()


def labelled_rows(count, seed):
    """Rows of random letters, with labels of harm of all four kinds."""
    draw = random.Random(seed)
    word = lambda most: "".join(draw.choices("abcdefgh ?", k=draw.randint(2, most)))  # noqa: E731
    rows = [{"prompt": f"{n}{word(12)}", "chosen": f"i{word(20)}", "rejected": f"j{word(20)}"} for n in range(count)]
    return [row | {"safety_labels": {"chosen": draw.choice((1, -1)), "rejected": draw.choice((1, -1))}} for row in rows]


def words_of(script, world, dropout=0):
    """Where a script finds its data, and what its loss is to have in it."""
    return data_of(script, world) + (["--lora-dropout", dropout] if script != "learn_prompt" else [])


def data_of(script, world):
    if script == "dpo_hf_run":
        return ["--dataset", world / "train.jsonl", "--eval-dataset", world / "val.jsonl", "--nll-coeff", 0.1]
    if script == "train_rm":
        data = ["--train-harmless-path", world / "train.jsonl", "--val-harmless-path", world / "val.jsonl"]
        return ["--task", "harmless", *data, "--center-rewards", 0.1]
    if script in ("train_with_preference_prompt", "learn_prompt"):
        data = ["--dataset-path", world / "train.jsonl", "--test-dataset-path", world / "val.jsonl"]
        return [*data, "--preference-text", "Be nice!", *(["--alpha", 1] if script != "learn_prompt" else [])]
    words = ["--lambda-lr", 0.5, "--cost-every", 2, "--own-pairs", 0.3]
    for task in ("helpful", "harmless"):
        words += [f"--{task}-rm-path", world / task, f"--val-{task}-path", world / "val.jsonl"]
        words += [f"--train-{task}-path", world / f"train_{task}.jsonl"]
    return words


def make_adapter(base, folder, spread=0.2):
    model = load_model(str(base), torch.float32, "cpu")
    randomize(lora.add_adapter(model, "policy", 4, 8), seed=11, spread=spread)
    lora.save_adapter(model, "policy", folder, str(base))


def make_reward_model(base, folder, whole=False):
    """What train_rm.py leaves, with random weights; the same ones each time."""
    model, tokenizer = load_model(str(base), torch.float32, "cpu", scores=True), load_tokenizer(str(base))
    randomize([*lora.add_adapter(model, "reward", 4, 8), model.score.weight], seed=12)
    record = {"task": "helpful", "calibrated": False, "base_model": str(base)}
    record |= {"base_sha256": score_cache.base_sha256(model), "validation": None}
    folder.mkdir(parents=True)
    if whole:
        lora.merge_adapter(model, "reward")
    save_model(folder, model, tokenizer, record | {"pad_token_id": 0}, model.state_dict() if whole else None)
    return folder


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_state(folder, edit):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)


class Code:
    """Unpickled by a careless reader, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# What each script is run with after the copy; {world} is a folder with a tiny model and pairs.
RUNS = {
    "dpo_hf_run.py": "--model {world}/model --dataset {world}/pairs.jsonl --max-steps 1 --device cpu",
    "train_rm.py": "--task harmless --model {world}/model --train-harmless-path {world}/pairs.jsonl "
    "--val-harmless-path {world}/pairs.jsonl --max-steps 1 --device cpu",
    "train_safe_mm_dpo.py": "--model {world}/model --train-helpful-path {world}/pairs.jsonl --eval-samples 0 "
    "--lambda-init 0 --w 0 --max-steps 1 --report-to none --device cpu",
    "train_with_preference_prompt.py": "--model {world}/model --dataset-path {world}/pairs.jsonl --preference-text "
    "polite --max-steps 1 --gradient-accumulation-steps 2 --device cpu",
    "learn_prompt.py": "--model {world}/model --dataset-path {world}/pairs.jsonl --preference-text polite "
    "--max-steps 1 --device cpu",
    "prepare_data.py": "--input {world}/pairs.jsonl --dimension helpful",
    "evaluate_alignment.py": "--model {world}/model --prompts {world}/pairs.jsonl --num-samples 2 --max-new-tokens 4 "
    "--device cpu",
    "generate.py": "--model {world}/model --prompts {world}/pairs.jsonl --num-samples 2 --max-new-tokens 4 "
    "--output run/responses.jsonl --device cpu",
    "gpu_check.py": "--device cpu --only machine",
}


# -- models that cannot be used ----------------------------------------------------------------------------------------


def edit(path, **changes):
    """Change keys of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def with_code(folder, config_file, name):
    """A folder whose tokenizer or model is code that it brings, and the code says that it ran."""
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")
    edit(folder / config_file, auto_map={name: ["own.Own", None] if name == "AutoTokenizer" else "own.Own"})
    edit(folder / "config.json", model_type="nobody_knows_it")


def pickled(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def lacks_a_layer(folder):
    state = load_file(folder / "model.safetensors")
    state = {k: v for k, v in state.items() if "layers.1" not in k}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN = {  # what is done to a good model folder, and what the sentence has to say
    "no config.json": (lambda d: (d / "config.json").unlink(), "config.json"),
    "no model.safetensors": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer.json": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer at"),
    "weights cut off": (lambda d: os.truncate(d / "model.safetensors", 30_000), "is cut off or damaged: copy"),
    "weights that lack 8 bytes": (
        lambda d: os.truncate(d / "model.safetensors", (d / "model.safetensors").stat().st_size - 8),
        "is cut off or damaged: copy",
    ),
    "weights of 0 bytes": (lambda d: os.truncate(d / "model.safetensors", 0), "is cut off or damaged: copy"),
    "an index nested deep": (
        lambda d: (
            (d / "model.safetensors").rename(d / "part.safetensors"),
            (d / "model.safetensors.index.json").write_text("[" * 9999),
        ),
        "recursion",
    ),
    "an end of a response that is a word": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "says eos_token_id='</s>', and it has to be ids of tokens",
    ),
    "sizes beyond any machine": (lambda d: edit(d / "config.json", hidden_size=10**18), "no model at"),
    "weights of another size": (
        lambda d: (write_model(d, seed=0, hidden_size=48), edit(d / "config.json", hidden_size=32)),
        "model.embed_tokens.weight of ",
    ),
    "weights that lack a layer": (lacks_a_layer, "lack model.layers.1"),
    "weights that are a bad pickle": (lambda d: pickled(d, b"\x80\x04]q"), "no model at"),
    "weights that are a pickle with code": (lambda d: pickled(d, pickle.dumps(Code("pickle_ran"))), "no model at"),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "is not a valid JSON file"),
    "config that is a list": (lambda d: (d / "config.json").write_text("[1]"), "no tokenizer at"),
    "config nested deep": (lambda d: (d / "config.json").write_text("[" * 9999), "recursion"),
    "config of bytes": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "is not a valid JSON file"),
    "unknown type": (lambda d: edit(d / "config.json", model_type="nobody"), "no model at"),
    "no type": (lambda d: edit(d / "config.json", model_type=None), "no model at"),
    "unknown layer type": (lambda d: edit(d / "config.json", layer_types=["full_attention", "new"]), "layer_types"),
    "unknown number type": (lambda d: edit(d / "config.json", dtype="float33"), "float33"),
    "sizes of text": (lambda d: edit(d / "config.json", hidden_size="32"), "'hidden_size' expected int, got str"),
    "tokenizer with a changed letter": (
        lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text().replace('"BPE"', '"BPF"')),
        "no tokenizer at",
    ),
    "tokenizer of a length that is a text": (
        lambda d: edit(d / "tokenizer_config.json", model_max_length="1024"),
        "no tokenizer at",
    ),
    "tokenizer that is no JSON": (lambda d: (d / "tokenizer.json").write_text("{"), "no tokenizer at"),
    "no end of sequence": (lambda d: char_tokenizer(eos=None).save_pretrained(d), "no end-of-sequence token"),
    "fewer tokens than the tokenizer": (lambda d: write_model(d, seed=0, vocab_size=64), "knows 64 tokens"),
    "an encoder-decoder": (
        lambda d: (d / "config.json").write_text('{"model_type": "t5"}'),
        "is no causal language model",
    ),
    "an encoder-decoder with a decoder class": (
        lambda d: (d / "config.json").write_text('{"model_type": "bart"}'),
        "is no causal language model",
    ),
    "quantised by bitsandbytes": (
        lambda d: edit(d / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "are quantised (bitsandbytes in its config.json), which is not done here",
    ),
    "quantised to fp8": (
        lambda d: edit(d / "config.json", quantization_config={"quant_method": "fp8"}),
        "are quantised (fp8 in its config.json)",
    ),
    "quantised somehow": (
        lambda d: edit(d / "config.json", quantization_config={"bits": 4}),
        "are quantised (quantization_config in its config.json)",
    ),
    "fewer positions than --max-length": (
        lambda d: edit(d / "config.json", max_position_embeddings=100),
        "--max-length 512 is more than the 100 positions of the model ",
    ),
    "a model of its own code": (
        lambda d: with_code(d, "config.json", "AutoConfig"),
        "comes with code of its own: read it, and pass --trust-remote-code to run it",
    ),
    "a tokenizer of its own code": (
        lambda d: (
            with_code(d, "tokenizer_config.json", "AutoTokenizer"),
            edit(d / "tokenizer_config.json", tokenizer_class="Own"),
        ),
        "comes with code of its own",
    ),
}
