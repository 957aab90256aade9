"""dpo_hf_run.py on pairs with pictures, as a user has them: a tiny LLaVA with its processor, files on the disk."""

import importlib
import json
import shutil
import sys

import pytest
import torch
import transformers
from ranks import run_ranks
from runs import adapter_of, metrics_of, run_script
from tiny_llava import TEMPLATE, assert_same_adapter, picture, png, read, reader_of, row, write_seen
from tiny_vision import IMAGE
from worlds import assistant, char_tokenizer, user, write_rows

import packed_model
import vision
from formats.model_files import load_model, load_tokenizer
from formats.picture_reader import PictureReader
from packing import pack
from preference_data import DataError


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = write_seen(tmp_path_factory.mktemp("seen"))
    write_rows(folder / "pairs.jsonl", [row(number) for number in range(16)])
    return folder


def words(folder, out, **changes):
    flags = dict(model=folder / "model", dataset=folder / "pairs.jsonl", output_dir=out, dtype="fp32", device="cpu")
    flags |= dict(report_to="none", logging_steps=1, learning_rate=1e-2, max_length=64, max_prompt_length=48, seed=1)
    flags |= dict(eval_samples=3, batch_size=2, gradient_accumulation_steps=2, lora_r=4, epochs=2) | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def losses(folder):
    return [line["loss"] for line in metrics_of(folder) if "loss" in line]


@pytest.fixture(scope="module")
def trained(seen, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    run_script(words(seen, out))
    return out


def test_a_run_learns_and_leaves_the_processor(seen, trained):
    assert losses(trained)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(trained)[-1] < 0.6
    assert all(".language_model." in name for name in adapter_of(trained))
    assert transformers.AutoProcessor.from_pretrained(trained).image_token == "<image>"


# -- rows ------------------------------------------------------------------------------------------------------------

ASKED = {"prompt": "what?", "chosen": "a", "rejected": "b"}
RLHF_V = json.dumps({"question": "what?", "chosen": "a", "rejected": "b"})


@pytest.mark.parametrize(
    "row",
    [
        ASKED | {"image": "pictures/1.png"},
        ASKED | {"images": ["pictures/1.png"]},
        ASKED | {"images": ["pictures/1.png"], "prompt": "<image>what?"},
        {"question": "what?", "chosen": "a", "rejected": "b", "image": "pictures/1.png"},
        {"text": RLHF_V, "image": "pictures/1.png", "image_path": "somewhere/1.png"},
        {
            "images": ["pictures/1.png"],
            "prompt": [user([{"type": "image"}, {"type": "text", "text": "what?"}])],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        },
        {"images": ["pictures/1.png"], "messages": [user("<image>what?"), assistant("a")], "rejected_response": "b"},
        {
            "images": ["pictures/1.png"],
            "conversations": [{"from": "human", "value": "<image>what?"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ],
    ids="image images mark question rlhf-v parts messages conversations".split(),
)
def test_rows_of_every_shape_are_one_pair(seen, row):
    (pair,) = read(seen, [row])
    (plain,) = read(seen, [ASKED | {"image": "pictures/1.png"}])
    assert pair[:3] == plain[:3] and pair.pictures.digests == plain.pictures.digests
    ids, given = pair.pictures.open()
    assert len(ids) == len(pair.prompt_ids) and ids == pair.prompt_ids
    assert ids.count(IMAGE) == 16 and given["pixel_values"].shape == (1, 3, 32, 32)


def test_bytes_are_pictures_too(seen, monkeypatch):
    data = (seen / "pictures/1.png").read_bytes()
    tokenizer, reader = reader_of(seen)
    (by_path,) = read(seen, [ASKED | {"image": "pictures/1.png"}])
    for given in (data, {"bytes": data, "path": None}, {"path": "pictures/1.png"}):
        _, found = reader.take(ASKED | {"images": [given]}, seen / "rows.jsonl")
        assert found.digests == by_path.pictures.digests and found.sizes == ((40, 32),)


def test_passes_are_cut_by_tokens_with_those_of_pictures_and_the_estimate_has_them(seen, tmp_path, capsys):
    longest = max(sum(map(len, pair[:3])) for pair in read(seen, [row(number) for number in range(16)]))
    assert longest > 2 * 16
    run_script(words(seen, tmp_path / "out", max_steps=1, tokens_per_microbatch=16, eval_samples=0))
    assert f"Pairs of more than 16 tokens take a pass each; the longest has {longest}\n" in capsys.readouterr().out
    run_script([*words(seen, tmp_path / "none"), "--estimate-memory"])
    said = capsys.readouterr().out
    assert "passes of at most 286 tokens" in said, "two pairs of two responses of 64, with 16 tokens in place of one"
    assert "\nWith one picture of 1024 x 1024 pixels in each pair: 16 tokens\n" in said


# -- what cannot be used -------------------------------------------------------------------------------------------


BAD = {
    "no file": ({"image": "pictures/none.png"}, "there is no picture {}/pictures/none.png"),
    "no picture": ({"image": "rows.jsonl"}, "the picture {}/rows.jsonl cannot be read (it is none that Pillow knows)"),
    "a folder": ({"image": "pictures"}, "the picture {}/pictures cannot be read (Is a directory)"),
    "a number": ({"images": [7]}, "a picture is neither a path nor bytes, but of type int"),
    "marks": (
        {"images": ["pictures/1.png"], "prompt": "<image><image>what?"},
        "it has 1 pictures, and 2 places for them in its prompt",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), BAD.values(), ids=BAD)
def test_a_picture_that_cannot_be_used_is_a_sentence_with_its_line(seen, tmp_path, capsys, changes, sentence):
    rows = write_rows(seen / "rows.jsonl", [ASKED | {"image": "pictures/1.png"}, ASKED | changes])
    with pytest.raises(SystemExit) as end:
        run_script(words(seen, tmp_path / "out", dataset=rows))
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert f"rows.jsonl:2: {sentence.format(seen)}; mend the row, or leave such rows out" in said
    assert "\n" not in said
    assert len(read(seen, [ASKED | {"image": "pictures/1.png"}, ASKED | changes], skip_invalid=True)) == 1


def test_a_picture_that_the_processor_refuses_is_a_sentence_with_its_line(seen, tmp_path, capsys):
    """Of a processor with Qwen2-VL's rule, which needs no torchvision: no side above 200 times the other."""
    of_images = pytest.importorskip("transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl")
    folder = tmp_path / "seen"
    shutil.copytree(seen, folder)
    (folder / "model/preprocessor_config.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer(str(folder / "model"))
    tokenizer.image_token, tokenizer.image_token_id = "<image>", IMAGE
    sizes = dict(patch_size=4, merge_size=1, size={"shortest_edge": 64, "longest_edge": 3200})
    of_images = of_images.PaddleOCRVLImageProcessorPil(**sizes)
    transformers.PaddleOCRVLProcessor(of_images, tokenizer, chat_template=TEMPLATE).save_pretrained(folder / "model")
    config = json.loads((folder / "model/tokenizer_config.json").read_text())
    config["extra_special_tokens"] = {"image_token": "<image>"}
    (folder / "model/tokenizer_config.json").write_text(json.dumps(config))
    picture(1, (800, 4)).save(folder / "pictures/200.png")
    picture(1, (804, 4)).save(folder / "pictures/201.png")
    rows = [ASKED | {"image": f"pictures/{ratio}.png"} for ratio in (200, 201)]
    (pair,) = read(folder, rows, skip_invalid=True)
    assert pair.prompt_ids.count(IMAGE) == 200
    with pytest.raises(SystemExit) as end:
        run_script(words(folder, tmp_path / "out", dataset=write_rows(folder / "rows.jsonl", rows)))
    assert end.value.code == 2
    said = capsys.readouterr()
    refusal = "the processor refuses its pictures (absolute aspect ratio must be smaller than 200, got 201.0)"
    assert f"rows.jsonl:2: {refusal}; mend the row" in said.err and "step 1" not in said.out
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_picture_that_breaks_when_it_is_decoded_ends_the_run_before_any_update(seen, tmp_path, capsys):
    data = png(picture(3, (64, 64)))
    (seen / "half.png").write_bytes(data[: len(data) // 2])
    rows = [row(number) for number in range(8)] + [ASKED | {"image": "half.png"}]
    path = write_rows(seen / "rows.jsonl", rows)
    with pytest.raises(SystemExit) as end:
        run_script(words(seen, tmp_path / "out", dataset=path, eval_samples=0))
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "rows.jsonl:9: a picture breaks when it is decoded" in said.err and "step 1" not in said.out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": "see <image>"}, "a response holds the token that stands for a picture"),
        ({"prompt": "long " * 40}, "the text of a prompt with pictures is longer than --max-prompt-length"),
        ({"images": ["pictures/1.png"] * 40}, "with its pictures it is longer than the model has positions"),
        ({"image": None, "prompt": "<image>what?"}, "its prompt holds the token that stands for a picture"),
    ],
)
def test_rows_that_cannot_be_trained_are_left_out_and_counted(seen, changes, reason):
    base = ASKED | ({} if "images" in changes else {"image": "pictures/1.png"})
    with pytest.raises(DataError, match=reason):
        read(seen, [base | changes], max_prompt_length=80)


def test_a_text_model_is_given_no_pictures(world, seen, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(words(seen, tmp_path / "out", model=world / "model"))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "pairs.jsonl:1: `image`: pictures need a vision-language model, and this one reads text alone" in said


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "PIL"])
def test_what_reads_pictures_is_missing(seen, tmp_path, capsys, monkeypatch, missing):
    folder = tmp_path / "seen"
    shutil.copytree(seen, folder)
    if missing == "PIL":
        monkeypatch.setitem(sys.modules, "PIL", None)
    for name in ("preprocessor_config.json", "processor_config.json") if missing != "PIL" else ():
        (folder / "model" / name).unlink(missing_ok=True)
    with pytest.raises(SystemExit) as end:
        run_script(words(folder, tmp_path / "out"))
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "install the extra with `bash setup.sh vision`" in said and "\n" not in said


# -- the same run in other ways --------------------------------------------------------------------------------------


def test_packed_is_as_one_by_one(seen, trained, tmp_path, monkeypatch, capsys):
    def refuse(model):
        raise packed_model.CannotPack("a test")

    monkeypatch.setattr(packed_model, "_check_head", refuse)
    run_script(words(seen, tmp_path / "out"))
    assert "packed pairs: off, sequences are scored one by one (a test)" in capsys.readouterr().out
    assert losses(tmp_path / "out") == pytest.approx(losses(trained), abs=2e-5)


def test_a_picture_is_decoded_once_where_its_features_are_kept(seen, trained, tmp_path, monkeypatch):
    """Of 16 rows four have none; later epochs, and the look at the first pair, decode nothing again."""
    process, decoded = PictureReader._process, []
    monkeypatch.setattr(PictureReader, "_process", lambda *args: decoded.append(1) or process(*args))
    run_script(words(seen, tmp_path / "kept", epochs=3))
    assert len(decoded) == 12
    decoded.clear()
    monkeypatch.setattr(vision, "KEPT_BYTES", 0)
    run_script(words(seen, tmp_path / "again"))
    assert len(decoded) > 24
    assert_same_adapter(trained, tmp_path / "again")


@pytest.mark.parametrize("order", [1, -1])
def test_one_prompt_whose_last_token_spans_the_seam_of_one_of_two_pairs(seen, tmp_path, order):
    shutil.copytree(seen, tmp_path / "seen")
    merged = char_tokenizer(merges=[("\n", "Z")], template=TEMPLATE, more={"<image>": IMAGE})
    merged.save_pretrained(tmp_path / "seen/model")
    rows = [ASKED | {"image": "pictures/1.png"} | said for said in ({}, {"chosen": "Za", "rejected": "Zb"})]
    pairs = read(tmp_path / "seen", rows[::order])
    assert {pair.pictures.num_behind for pair in pairs} == {0, 1}
    for _ in range(2):  # as it is opened first, and again
        batch = pack(pairs)
        for pair, segment in zip(pairs, batch.segments, strict=True):
            assert batch.input_ids[0, segment.prompt_start : segment.chosen_start].tolist() == pair.prompt_ids


def test_a_cache_gives_the_same_run_and_other_settings_of_the_processor_another_cache(seen, trained, tmp_path, capsys):
    cache = tmp_path / "cache"
    for name in ("first", "second"):
        run_script(words(seen, tmp_path / name, cache_dir=cache))
    said = capsys.readouterr().out
    assert "computed now and kept" in said and "read from" in said
    assert_same_adapter(trained, tmp_path / "first")
    assert_same_adapter(trained, tmp_path / "second")
    other = tmp_path / "seen"
    shutil.copytree(seen, other)
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = other / "model" / name
        if path.exists():
            path.write_text(path.read_text().replace("0.48145466", "0.3"))
    run_script(words(other, tmp_path / "third", cache_dir=cache))
    assert "read from" not in capsys.readouterr().out
    (other / "pictures/1.png").write_bytes(png(picture(77)))
    run_script(words(other, tmp_path / "fourth", cache_dir=cache))
    assert "read from" not in capsys.readouterr().out


def test_a_run_that_is_cut_off_and_goes_on_is_the_same_to_the_bit(seen, trained, tmp_path):
    run_script(words(seen, tmp_path / "out", save_steps=2))
    assert_same_adapter(trained, tmp_path / "out")
    checkpoint = min(tmp_path.glob("out/checkpoint-*"))
    shutil.copytree(checkpoint, tmp_path / "again" / checkpoint.name)
    run_script([*words(seen, tmp_path / "again", save_steps=2), "--resume=auto"])
    assert_same_adapter(trained, tmp_path / "again")


def test_two_ranks_are_one_process(seen, trained, tmp_path):
    two = words(seen, tmp_path / "out", gradient_accumulation_steps=1)
    codes, said = run_ranks("dpo_hf_run", two, 2, tmp_path / "log")
    assert codes == [0, 0], said
    assert losses(tmp_path / "out") == pytest.approx(losses(trained), abs=1e-5)
    assert_same_adapter(trained, tmp_path / "out", 1e-4)


def test_all_weights_over_two_ranks_are_those_of_one_process(seen, tmp_path):
    """Sharded, and with a rank whose pass has pictures where the other's has none."""
    one = words(seen, tmp_path / "one", lora_r=0, max_steps=3)
    two = words(seen, tmp_path / "two", lora_r=0, max_steps=3, gradient_accumulation_steps=1)
    run_script(one)
    codes, said = run_ranks("dpo_hf_run", two, 2, tmp_path / "log")
    assert codes == [0, 0], said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_a_merged_model_is_the_adapted_one_with_its_tower(seen, tmp_path):
    run_script([*words(seen, tmp_path / "out", max_steps=2), "--save-merged"])
    before = load_model(str(seen / "model"), torch.float32, "cpu").state_dict()
    after = load_model(str(tmp_path / "out/merged"), torch.float32, "cpu").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".language_model." in name for name in changed)
    assert (tmp_path / "out/merged/processor_config.json").exists()


def test_a_template_that_drops_strings_is_given_parts_for_text_too(seen):
    tokenizer, _ = reader_of(seen)
    as_it_is = tokenizer.apply_chat_template([user("hi")], tokenize=False)
    assert as_it_is == "<|im_start|>user\nhi<|im_end|>\n"
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "")
    assert tokenizer.apply_chat_template([user("hi")], tokenize=False) == as_it_is
    assert load_tokenizer(str(seen / "model")).apply_chat_template([user("hi")], tokenize=False) == as_it_is


@pytest.mark.parametrize("script", ["train_rm", "train_with_preference_prompt", "learn_prompt"])
def test_the_other_scripts_refuse_rows_with_pictures_in_one_sentence(world, seen, tmp_path, capsys, script):
    data = {"train_rm": "--train-helpful-path"}.get(script, "--dataset-path")
    task = ["--task", "helpful"] if script == "train_rm" else ["--preference-text", "Be nice!"]
    argv = ["--model", world / "model", data, seen / "pairs.jsonl", "--output-dir", tmp_path / "out", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        run_script([*argv, *task, "--max-length", 64, "--max-prompt-length", 32], importlib.import_module(script))
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "pairs.jsonl:1: `image`: pictures need a vision-language model" in said and "\n" not in said
