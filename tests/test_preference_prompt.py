"""preference_prompt.py: texts, virtual tokens against plain forwards with inputs_embeds, soft-prompt files and what
they must not do; and the preference in preference_data.load_pairs.
"""

import json
import re
from functools import partial

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from runs import adapter_of
from safetensors.torch import save_file
from tiny_models import double_model, random_pairs, tiny_model
from torch import nn
from worlds import CHATML, Code, assistant, char_tokenizer, ids, load, user, write_rows

from packed_model import prepare_model
from packing import pack
from preference_data import Pair
from preference_prompt import (
    PromptError,
    read_soft_prompt,
    save_soft_prompt,
    use_soft_prompt,
    with_text,
    with_virtual_tokens,
)

MODELS = ["qwen3", "llama", "gemma3", "gpt2", "bloom"]  # bloom is scored sequence by sequence
POSITIONS = ["prefix", "before-response"]
SHAPES = [(5, 4, 3), (1, 3, 1), (9, 1, 6), (12, 7, 8)]  # (prompt, chosen, rejected) lengths, one batch


def system(content):
    return {"role": "system", "content": content}


# -- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_in_messages_and_in_strings():
    talk = [user("a"), assistant("b"), user("c")]
    before = json.dumps(talk)
    assert with_text(talk, "T") == with_text(talk, "T", "system") == [system("T"), *talk]
    assert with_text([system("s"), *talk], "T") == [system("s\nT"), *talk]
    assert with_text(talk, "T", "user") == [user("a"), assistant("b"), user("c T")]
    assert with_text([system("s"), *talk], "T", "user") == [system("s"), user("a"), assistant("b"), user("c T")]
    assert with_text([user("a"), assistant("b")], "T", "user") == [user("a T"), assistant("b")]
    assert with_text([user("a") | {"name": "Ann"}], "T", "user") == [user("a T") | {"name": "Ann"}]
    for position in ("system", "user"):
        assert with_text("How?", "T", position) == "How? T"
        for prompt in ("How?", "", talk):
            assert with_text(prompt, "", position) is prompt
    assert json.dumps(talk) == before, "the row itself must not change"
    with pytest.raises(PromptError, match="no message of a user .* use --preference-position system"):
        with_text([system("s"), assistant("b")], "T", "user")


def test_virtual_tokens_stand_before_or_behind_the_prompt():
    assert with_virtual_tokens([7, 8], 3, "prefix") == [-1, -2, -3, 7, 8]
    assert with_virtual_tokens([7, 8], 3, "before-response") == [7, 8, -1, -2, -3]


# -- a soft prompt in a model -----------------------------------------------------------------------------------------


def prompted(pairs, num_vectors, position):
    return [Pair(with_virtual_tokens(p, num_vectors, position), c, r) for p, c, r, *_ in pairs]


def scores(model, pairs):
    return torch.stack(model.packed_logps(pack(pairs)))


def oracle(model, pairs, vectors, position):
    """(2, B): transformers' own forward with inputs_embeds, one sequence at a time, in the type of the model."""
    sums, embed = [], model.get_input_embeddings()
    for side in (1, 2):
        for pair in pairs:
            target = torch.tensor(pair[side])
            prompt, response = embed(torch.tensor(pair[0])), embed(target)
            prompt = torch.cat((vectors, prompt) if position == "prefix" else (prompt, vectors))
            rows = torch.cat((prompt, response))[None]
            table = model(inputs_embeds=rows, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(table.gather(1, target[:, None]).sum())
    return torch.stack(sums).view(2, -1)


def packs(name, model):
    assert prepare_model(model).startswith(f"packed pairs: {'off' if name == 'bloom' else 'on'}")
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_vectors_of_a_text_are_that_text(name):
    """get_input_embeddings()(ids), Gemma's scale included, at both places; taken off, the model is as before."""
    model = packs(name, tiny_model(name))
    text, pairs = [11, 45, 3, 60, 11], random_pairs(SHAPES)
    vectors = model.get_input_embeddings()(torch.tensor(text))
    plain = scores(model, pairs)
    for position in POSITIONS:
        put = [text + p if position == "prefix" else p + text for p, _, _, *_ in pairs]
        expected = scores(model, [Pair(p, pair[1], pair[2]) for p, pair in zip(put, pairs)])
        take_off = use_soft_prompt(model, vectors)
        torch.testing.assert_close(scores(model, prompted(pairs, 5, position)), expected, rtol=0, atol=1e-6)
        assert torch.equal(scores(model, pairs), plain)  # rows without virtual tokens do not see it
        take_off()
        assert (expected - plain).abs().max() > 0.1, "a text that changes nothing would show nothing"
        assert torch.equal(scores(model, pairs), plain)
    with pytest.raises(IndexError):
        scores(model, prompted(pairs, 5, "prefix"))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_any_vectors_equal_plain_forwards_with_inputs_embeds_in_fp64(name, position):
    model, untouched = double_model(name), double_model(name)
    packs(name, model)
    vectors = torch.randn(3, model.get_input_embeddings().weight.shape[1], dtype=torch.float64)
    pairs = random_pairs(SHAPES)
    pairs[0].prompt_ids[2] = 0  # a real token 0 keeps its own embedding
    use_soft_prompt(model, vectors)
    rows = prompted(pairs, 3, position)
    together = scores(model, rows)
    torch.testing.assert_close(together, oracle(untouched, pairs, vectors, position), rtol=1e-12, atol=1e-11)
    mixed = scores(model, [rows[0], pairs[1], rows[2], pairs[3]])  # only some rows of the batch have it
    torch.testing.assert_close(mixed[:, [0, 2]], together[:, [0, 2]], rtol=1e-12, atol=1e-11)
    for place, row in enumerate(rows):
        torch.testing.assert_close(scores(model, [row])[:, 0], together[:, place], rtol=1e-12, atol=1e-11)
    turned = oracle(untouched, pairs, vectors.flip(0), position)
    assert (turned - together).abs().max() > 1e-3, "the order of the vectors counts"


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "bloom"])
def test_the_gradient_of_the_vectors_is_that_of_finite_differences(name):
    step, error = (1e-3, 1e-2) if name == "bloom" else (1e-5, 1e-6)  # Bloom's softmax is fp32 in any model
    model = packs(name, double_model(name).requires_grad_(False))
    pairs = random_pairs(SHAPES[:2])
    vectors = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 0.3], [-1.0, 0.7]], dtype=torch.float64)
    for position in POSITIONS:

        def total(values, position=position):
            take_off = use_soft_prompt(model, values)
            result = (scores(model, prompted(pairs, 2, position)) * weights).sum()
            take_off()
            return result

        vectors.grad = None
        total(vectors).backward()
        for seed in range(3):
            way = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                slope = (total(vectors + step * way) - total(vectors - step * way)) / (2 * step)
            assert (vectors.grad * way).sum().item() == pytest.approx(slope.item(), rel=error, abs=error)


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # a head of its own, and one tied to the embeddings
def test_a_trained_embedding_layer_gets_nothing_from_virtual_tokens(name):
    """The layer looks up token 0 for them: its row must stay out of it, and keep what a real token 0 gives it."""
    with_zero = random_pairs(SHAPES)
    with_zero[1].prompt_ids[0] = 0
    for pairs in (random_pairs(SHAPES), with_zero):
        model, untouched = (double_model(name, pad_token_id=None) for _ in range(2))  # a pad token never has a gradient
        packs(name, model)
        vectors = torch.randn(3, 32, dtype=torch.float64)
        use_soft_prompt(model, vectors)
        scores(model, prompted(pairs, 3, "prefix")).sum().backward()
        oracle(untouched, pairs, vectors, "prefix").sum().backward()
        got, expected = (m.get_input_embeddings().weight.grad for m in (model, untouched))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        if name == "llama":
            assert (got[0].abs().max() > 1e-3) == (pairs is with_zero)


# -- files ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_with_its_place(tmp_path):
    vectors = torch.randn(4, 8)
    for position in POSITIONS:
        save_soft_prompt(vectors.to(torch.float64), tmp_path / position, "base", position)
        for path in (tmp_path / position, *(tmp_path / position).glob("*.safetensors"), *tmp_path.glob("*/*.pt")):
            found, trained_for = read_soft_prompt(path, 8)
            assert torch.equal(found, vectors) and found.dtype == torch.float32
            assert trained_for == (position if path.parent == tmp_path else path.parent.name)
    config = json.loads((tmp_path / "prefix/adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING" and config["base_model_name_or_path"] == "base"
    assert (config["num_virtual_tokens"], config["token_dim"]) == (4, 8)
    assert torch.equal(adapter_of(tmp_path / "prefix")["prompt_embeddings"], vectors)


def test_a_folder_that_peft_wrote(tmp_path):
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "peft")
    vectors, position = read_soft_prompt(tmp_path / "peft", 32)
    assert position == "prefix" and vectors.shape == (3, 32)
    assert torch.equal(vectors, model.prompt_encoder["default"].embedding.weight.detach())


TABLE = torch.arange(12.0).view(3, 4)
FORMS = {  # what a file holds -> the vectors in it
    "prompt_embeddings": ({"prompt_embeddings": TABLE, "other": TABLE + 1}, TABLE),
    "embeddings": ({"embeddings": TABLE}, TABLE),
    "weight": ({"weight": TABLE}, TABLE),
    "one vector under a name": ({"embeddings": TABLE[1].clone()}, TABLE[1:2]),
    "bf16": ({"weight": TABLE.bfloat16()}, TABLE),
    "tensor": (TABLE, TABLE),
    "one vector": (TABLE[2].clone(), TABLE[2:]),
    "parameter": (nn.Parameter(TABLE.clone()), TABLE),
    "state_dict": (nn.Embedding.from_pretrained(TABLE).state_dict(), TABLE),
}


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file(tmp_path, form, kind):
    content, expected = FORMS[form]
    path = tmp_path / f"soft.{kind}"
    if kind == "pt":
        torch.save(content, path)
    elif isinstance(content, dict):
        save_file(dict(content), path)
    else:
        pytest.skip("a .safetensors file has names")
    vectors, position = read_soft_prompt(path, 4)
    assert torch.equal(vectors, expected) and vectors.dtype == torch.float32 and position is None
    assert not vectors.requires_grad


def peft_folder(path, config):
    path.mkdir()
    (path / "adapter_config.json").write_text(config)
    save_file({"prompt_embeddings": TABLE}, path / "adapter_model.safetensors")


def torn(path, keep):
    torch.save(torch.randn(50, 4), path)
    path.write_bytes(path.read_bytes()[:keep])


BAD = {  # name of the file -> (how it is made, what the sentence says)
    "missing.pt": (lambda path: None, "there is no soft prompt"),
    "narrow.pt": (partial(torch.save, torch.ones(2, 3)), "2 vectors of width 3, and embeddings here have 4"),
    "wide.safetensors": (lambda p: save_file({"weight": torch.ones(2, 5)}, p), "2 vectors of width 5"),
    "nan.pt": (partial(torch.save, torch.tensor([[1, 2, float("nan"), 4]])), "not finite"),
    "inf.pt": (partial(torch.save, torch.tensor([[1, 2, float("inf"), 4]])), "not finite"),
    "int.pt": (partial(torch.save, torch.ones(2, 4, dtype=torch.int64)), "torch.int64 (2, 4)"),
    "complex.pt": (partial(torch.save, torch.ones(2, 4, dtype=torch.complex64)), "torch.complex64"),
    "cube.pt": (partial(torch.save, torch.ones(1, 2, 4)), "(1, 2, 4)"),
    "number.pt": (partial(torch.save, torch.tensor(1.0)), "torch.float32 ()"),
    "none.pt": (partial(torch.save, torch.ones(0, 4)), "0 vectors of width 4"),
    "zero.pt": (partial(torch.save, torch.ones(3, 0)), "width 0"),
    "list.pt": (partial(torch.save, [1.0, 2.0]), "list"),
    "names.pt": (partial(torch.save, {"soft": TABLE}), "holds soft, and none of prompt_embeddings, embeddings, weight"),
    "no names.pt": (partial(torch.save, {}), "holds nothing"),
    "no names.safetensors": (lambda path: save_file({"x": TABLE}, path), "holds x, and none of"),
    "module.pt": (partial(torch.save, nn.Embedding(2, 4)), "holds more than tensors and was not run"),
    "garbage.pt": (lambda path: path.write_bytes(b"\x93garbage" * 9), ""),
    "text.pt": (lambda path: path.write_text("1 2 3\n"), ""),
    "empty.pt": (lambda path: path.write_bytes(b""), ""),
    "head.pt": (lambda path: torn(path, 1), ""),
    "torn.pt": (lambda path: torn(path, 700), ""),
    "garbage.safetensors": (lambda path: path.write_bytes(b"\x93garbage" * 9), "cannot be read as safetensors"),
    "empty folder": (lambda path: path.mkdir(), "is no folder of a soft prompt"),
    "LoRA": (
        lambda path: peft_folder(path, '{"peft_type": "LORA"}'),
        "adapter of the type LORA, and a soft prompt is PROMPT_TUN",
    ),
    "no JSON": (lambda path: peft_folder(path, "{"), "is no folder of a soft prompt"),
    "a list": (lambda path: peft_folder(path, "[]"), "no object {...}"),
    "nested": (lambda path: peft_folder(path, "[" * 5000 + "]" * 5000), "adapter_config.json: nested too deeply"),
    "twice": (lambda path: peft_folder(path, '{"peft_type": 1, "peft_type": "PROMPT_TUNING"}'), "stands twice"),
    "no weights": (
        lambda path: save_soft_prompt(TABLE, path, "", "prefix") or (path / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_soft_prompt_is_one_sentence(tmp_path, name):
    make, sentence = BAD[name]
    make(tmp_path / name)
    with pytest.raises(PromptError) as error:
        read_soft_prompt(tmp_path / name, 4)
    said = str(error.value)
    assert sentence in said and str(tmp_path / name) in said
    assert "\n" not in said and len(said) < 600


def test_a_changed_bit_in_the_pickle_of_a_pt_file_is_one_sentence_or_harmless(tmp_path):
    path = tmp_path / "soft.pt"
    torch.save({"prompt_embeddings": TABLE, "preference_position": "prefix"}, path)
    whole, sentences = path.read_bytes(), 0
    start = whole.index(b"\x80\x02}")
    end = whole.index(b"u.", start) + 2
    for place in range(start, end):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            read_soft_prompt(path, 4)
        except PromptError as error:
            assert "\n" not in str(error)
            sentences += 1
    assert sentences > (end - start) / 2


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pt_file_is_not_run(tmp_path, legacy):
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    content = {"prompt_embeddings": TABLE, "preference_position": Code(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(PromptError, match="holds more than tensors and was not run"):
        read_soft_prompt(path, 4)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # it does bite
    assert trace.exists()


# -- a text in the data -----------------------------------------------------------------------------------------------

TALK = {"prompt": [user("Hello there, how are you")], "chosen": [assistant("fine")], "rejected": [assistant("no")]}
TEXT = "Be brief."


def talk_ids(text):
    """What char_tokenizer gives to a ChatML text, written out by hand."""
    names = {"<|im_start|>": [2], "<|im_end|>": [3]}
    return [i for part in re.split(r"(<\|im_start\|>|<\|im_end\|>)", text) for i in names.get(part) or ids(part)]


def load_with(tmp_path, row, tokenizer=None, position="system", text=TEXT, **options):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    (pair,), _ = load(path, tokenizer, prefer=partial(with_text, text=text, position=position), **options)
    (plain,), _ = load(path, tokenizer, **options)
    assert pair[:3] == plain[:3] and plain.prompted_ids is None, "the plain pair does not know of the preference"
    return pair


def test_a_string_with_a_text_behind_it(tmp_path):
    row = {"prompt": "How?", "chosen": " so", "rejected": " not"}
    assert load_with(tmp_path, row).prompted_ids == ids("How? Be brief.")
    assert load_with(tmp_path, row, text="").prompted_ids == ids("How?")
    with_bos = load_with(tmp_path, row, char_tokenizer(before="<s>", after="</s>"))
    assert with_bos.prompt_ids == [0, *ids("How?")] and with_bos.prompted_ids == [0, *ids("How? Be brief.")]


@pytest.mark.parametrize("position", ["system", "user"])
def test_messages_with_a_text_are_the_templates_words(tmp_path, position):
    pair = load_with(tmp_path, TALK, char_tokenizer(template=CHATML, eos="<|im_end|>"), position)
    before, behind = (f"<|im_start|>system\n{TEXT}<|im_end|>\n", "") if position == "system" else ("", f" {TEXT}")
    talk = f"<|im_start|>user\nHello there, how are you{behind}<|im_end|>\n<|im_start|>assistant\n"
    assert pair.prompted_ids == talk_ids(before + talk)
    assert pair.chosen_ids == [*ids("fine"), 3]


def test_the_toy_worlds_tokenizer(toy, tmp_path):
    from formats.model_files import load_tokenizer

    tokenizer = load_tokenizer(toy / "model")
    for position in ("system", "user"):
        prefer = partial(with_text, text=TEXT, position=position)
        pairs, _ = load(toy / "val/polite_pairs.jsonl", tokenizer, limit=40, prefer=prefer)
        rows = [json.loads(line) for line in (toy / "val/polite_pairs.jsonl").read_text().splitlines()[:40]]
        for pair, row in zip(pairs, rows, strict=True):
            asked = row["prompt"][0]["content"]
            said = f"{TEXT}\nUser:\n{asked}" if position == "system" else f"User:\n{asked} {TEXT}"
            assert pair.prompted_ids == tokenizer(f"{said}\nAssistant:\n")["input_ids"]
            assert pair.prompt_ids == tokenizer(f"User:\n{asked}\nAssistant:\n")["input_ids"]


@pytest.mark.parametrize(("keep", "rest"), [(40, "lo there, how are you"), (21, "ou"), (20, "u")])
def test_a_cut_chat_loses_the_same_words_and_the_preference_none(tmp_path, keep, rest):
    tokenizer = char_tokenizer(template=CHATML, eos="<|im_end|>")
    around = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    options = dict(max_length=60, max_prompt_length=keep)
    pair = load_with(tmp_path, TALK, tokenizer, **options)
    assert pair.prompt_ids == talk_ids(around.format(rest)) and len(pair.prompt_ids) == keep
    assert pair.prompted_ids == talk_ids(f"<|im_start|>system\n{TEXT}<|im_end|>\n" + around.format(rest))
    pair = load_with(tmp_path, TALK, tokenizer, "user", **options)
    assert pair.prompted_ids == talk_ids(around.format(f"{rest} {TEXT}"))
    assert load_with(tmp_path, TALK, tokenizer, text="", **options).prompted_ids == pair.prompt_ids


@pytest.mark.parametrize(("keep", "rest"), [(6, " now?"), (3, "w?"), (2, "?")])
def test_a_cut_string_keeps_its_bos_and_the_text(tmp_path, keep, rest):
    row = {"prompt": "What now?", "chosen": " so", "rejected": " not"}
    pair = load_with(tmp_path, row, char_tokenizer(before="<s>"), max_length=30, max_prompt_length=keep)
    assert pair.prompt_ids == [0, *ids(rest)] and pair.prompted_ids == [0, *ids(rest + " Be brief.")]


def test_a_token_across_the_seam_goes_from_both_prompts(tmp_path):
    """The newline that ends the prompt is one token with the response's first letter."""
    template = "{% for m in messages %}{{ m.content + ('' if m.role == 'assistant' else '\n') }}{% endfor %}"
    tokenizer = char_tokenizer(merges=[("\n", "y"), ("\n", "n")], template=template)
    row = {"prompt": [user("a:")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    pair = load_with(tmp_path, row, tokenizer)
    assert pair.chosen_ids == [128, *ids("es"), 1] and pair.rejected_ids == [129, *ids("o"), 1]
    assert pair.prompt_ids == ids("a:") and pair.prompted_ids == ids("Be brief.\na:")
    string = {"prompt": "a\n", "chosen": "yes", "rejected": "no"}
    assert load_with(tmp_path, string, tokenizer).prompted_ids == ids("a\n Be brief.")
