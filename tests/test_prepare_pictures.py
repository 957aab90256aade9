"""prepare_data.py on rows with pictures: the public sets, from a raw file to the pairs that training reads."""

import functools
import hashlib
import json
import shutil
import signal
from pathlib import Path

import pytest
from found_files import parquet
from prepared import ALL_TEST, ALL_TRAIN, MEND, account, be_killed, counts, fails, prepare, read_data
from processes import fork
from runs import snapshot
from tiny_llava import picture as picture_of
from tiny_llava import png, read, reader_of, write_model
from worlds import assistant, user, write_rows

from preference_data import load_pairs


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Every test runs in its own folder, with eight pictures in raw/."""
    monkeypatch.chdir(tmp_path)
    Path("raw").mkdir()
    for number in range(8):
        Path(f"raw/{number}.png").write_bytes(png(picture_of(number)))
    return tmp_path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    write_model(folder / "model")
    return folder


def data_of(number):
    return Path(f"raw/{number}.png").read_bytes()


def sha(number):
    return hashlib.sha256(data_of(number)).hexdigest()


def asked(picture, **more):
    return {"image": picture, "question": "what?", "chosen": "a", "rejected": "b"} | more


def trl(picture):
    said = {"chosen": [{"type": "text", "text": "a"}], "rejected": [{"type": "text", "text": "b"}]}
    prompt = [user([{"type": "image", "text": None}, {"type": "text", "text": "what?"}])]
    return [{"images": [picture], "prompt": prompt} | {name: [assistant(text)] for name, text in said.items()}]


def rlhf_v(picture):
    text = json.dumps({"question": "what?", "chosen": "a", "rejected": "b"})
    about = {"ds_name": "RLHF-V", "origin_dataset": "VQAv2", "origin_split": '{"model": "x"}', "idx": 0}
    return [about | {"image": picture, "text": text, "image_path": "RLHF-V/1.jpg"}]


def beaver_v(picture):
    row = {"question": "what?", "image": picture, "category": "Violence", "image_severity": 2}
    return [row | {"response": text, "is_response_safe": is_safe} for text, is_safe in (("b", "no"), ("a", "yes"))]


RLAIF_V = {"ds_name": "RLAIF-V", "image_path": "1.jpg", "origin_dataset": "OK-VQA", "origin_split": "{}", "idx": 0}
SETS = {  # name -> its rows for a picture, the dimension, and what is written beside prompt and responses
    "RLHF-V": (rlhf_v, "helpful", {}),
    "RLAIF-V": (lambda picture: [asked(picture, **RLAIF_V)], "helpful", {}),
    "trl-lib": (trl, "helpful", {}),
    "SPA-VL": (lambda picture: [asked(picture, class1="Representation")], "harmless", {}),
    "MM-RLHF": (
        lambda picture: [{"id": "1", "image": picture, "prompt": "what?", "chosen": "a", "rejected": "b"}],
        "helpful",
        {},
    ),
    "BeaverTails-V": (
        beaver_v,
        "harmless",
        {"safety_labels": {"chosen": -1, "rejected": 1}, "category": "Violence"},
    ),
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", SETS)
def test_a_public_set_becomes_pairs_that_training_reads(seeing, tmp_path, name, kind):
    rows_of, dimension, more = SETS[name]
    if kind == "parquet":
        rows = [row for n in (1, 2) for row in rows_of({"bytes": data_of(n), "path": "elsewhere.jpg"})]
        Path("raw/rows.parquet").write_bytes(parquet(*rows))
    else:
        write_rows(Path("raw/rows.jsonl"), [row for n in (1, 2) for row in rows_of(f"{n}.png")])
    (plain,) = read(seeing, [{"image": str(tmp_path / "raw/1.png"), "prompt": "what?", "chosen": "a", "rejected": "b"}])
    expected = sorted([sha(1), sha(2)])
    prepare("--input", f"raw/rows.{kind}", "--dimension", dimension, *ALL_TRAIN)
    shutil.rmtree("raw")
    Path("data").rename("moved")

    assert account("moved")["rows"] == {"read": len(rows_of("")) * 2, "used": len(rows_of("")) * 2, "dropped": {}}
    assert account("moved")["prompts"] == {"train": 2, "val": 0, "test": 0}
    written = read_data("moved")["train", dimension]
    assert sorted(row["images"] for row in written) == [[f"../images/{digest}.png"] for digest in expected]
    assert sorted(path.name for path in Path("moved/images").iterdir()) == [f"{digest}.png" for digest in expected]
    for row in written:
        rest = {key: value for key, value in row.items() if "prompt" not in key and key != "images"}
        assert [value for key, value in rest.items() if "chosen" in key or "rejected" in key] in (
            ["a", "b"],
            [[assistant("a")], [assistant("b")]],
        )
        assert {"dimension": dimension} | more == {
            k: v for k, v in rest.items() if "chosen" not in k and "rej" not in k
        }

    tokenizer, reader = reader_of(seeing)
    pairs, _ = load_pairs(f"moved/train/{dimension}_pairs.jsonl", tokenizer, 512, 48, reader=reader)
    assert [one[:3] for one in pairs] == [plain[:3]] * 2
    assert sorted(one.pictures.digests for one in pairs) == [(digest,) for digest in expected]
    assert all(one.pictures.open()[0] == plain.prompt_ids for one in pairs)


# -- which prompts are one ---------------------------------------------------------------------------------------------


def test_the_bytes_of_a_picture_make_a_prompt_and_not_its_name(capsys):
    shutil.copy("raw/1.png", "raw/again.png")
    rows = [asked("1.png"), asked("again.png"), asked("2.png", chosen="b", rejected="a"), asked("3.png")]
    rows += [asked("4.png"), asked("4.png", chosen="b", rejected="a")]
    write_rows(Path("raw/rows.jsonl"), rows)
    prepare("--input", "raw/rows.jsonl", "--dimension", "helpful", *ALL_TRAIN)
    assert "pictures: 3, in images/" in capsys.readouterr().out
    # That of another picture is no contradiction, and that of the same bytes is a copy.
    assert account()["pairs"]["kept"] == 3
    assert account()["pairs"]["dropped"] == {
        "the same pair is there already": {"count": 1, "first": "raw/rows.jsonl:2"},
        "the same two responses are there the other way round": {"count": 2, "first": "raw/rows.jsonl:5"},
    }
    assert {path.stem for path in Path("data/images").iterdir()} == {sha(1), sha(2), sha(3)}


def test_safe_and_harmful_responses_are_paired_at_one_picture_alone():
    rows = [beaver_v("1.png")[0], beaver_v("2.png")[1], *beaver_v("3.png")]
    write_rows(Path("raw/rows.jsonl"), rows)
    prepare("--input", "raw/rows.jsonl", *ALL_TRAIN)
    (row,) = read_data("data")["train", "harmless"]
    assert row["images"] == [f"../images/{sha(3)}.png"]
    assert counts(account()["responses"]["dropped"]) == {
        "all responses to the prompt are harmful": 1,
        "all responses to the prompt are safe": 1,
    }
    assert [path.stem for path in Path("data/images").iterdir()] == [sha(3)]  # of dropped rows none is written


def test_pictures_decide_the_split_and_text_rows_stay_where_they_are():
    for number in range(60):
        Path(f"raw/{number}.png").write_bytes(png(picture_of(number, (24, 20))))
    texts = [{"prompt": f"q{number}", "chosen": "a", "rejected": "b"} for number in range(60)]
    write_rows(Path("texts.jsonl"), texts)
    write_rows(Path("raw/seen.jsonl"), [asked(f"{number}.png") for number in range(60)])
    prepare("--input", "texts.jsonl", "--dimension", "helpful", "--output-dir", "alone")
    prepare("--input", "raw/seen.jsonl", "texts.jsonl", "--dimension", "helpful")
    both, alone = read_data("data"), read_data("alone")
    assert {key: [row for row in rows if "images" not in row] for key, rows in both.items()} == alone
    # One question, 60 pictures: 48, 6 and 6 are expected.
    numbers = [sum("images" in row for row in both[split, "helpful"]) for split in ("train", "val", "test")]
    assert sum(numbers) == 60 and 40 <= numbers[0] <= 56 and min(numbers) >= 1
    # Neither other rows nor the order have a say.
    write_rows(Path("raw/back.jsonl"), [asked(f"{number}.png") for number in reversed(range(60))])
    prepare("--input", "raw/back.jsonl", "--dimension", "helpful", "--output-dir", "back")
    seen = {key: [row for row in rows if "images" in row] for key, rows in both.items()}
    assert read_data("back") == seen


def test_the_benchmark_names_the_pictures_from_where_it_is():
    write_rows(Path("raw/rows.jsonl"), beaver_v("1.png"))
    Path("there").mkdir()
    prepare("--input", "raw/rows.jsonl", "--safety-benchmark", "there/b.jsonl", *ALL_TEST)
    (row,) = map(json.loads, Path("there/b.jsonl").read_text().splitlines())
    assert row == {"images": [f"../data/images/{sha(1)}.png"], "prompt": "what?\n", "category": "Violence"}
    assert Path("there", row["images"][0]).read_bytes() == data_of(1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_pillow_writes_is_known_by_its_first_bytes(kind):
    picture_of(1).save("raw/picture", kind)
    write_rows(Path("raw/rows.jsonl"), [asked("picture")])
    prepare("--input", "raw/rows.jsonl", "--dimension", "helpful", *ALL_TRAIN)
    (path,) = Path("data/images").iterdir()
    assert path.suffix == {"JPEG": ".jpg"}.get(kind, f".{kind.lower()}")
    assert path.read_bytes() == Path("raw/picture").read_bytes()


# -- mistakes ----------------------------------------------------------------------------------------------------------

BAD = {
    "no file": (asked("none.png"), "there is no picture raw/none.png"),
    "no picture": (
        asked("rows.jsonl"),
        "the picture raw/rows.jsonl is none by its first bytes, which are not those of png, jpg, gif, webp, bmp or",
    ),
    "a folder": (asked("."), "the picture raw cannot be read (Is a directory)"),
    "neither": (asked({"bytes": None, "path": None}), "a picture is neither a path nor bytes, but of type NoneType"),
    "a number": (asked(7), "a picture is neither a path nor bytes, but of type int"),
    "marks": (
        asked("1.png", question="<image><image>what?"),
        "it has 1 pictures, and 2 places for them in its prompt",
    ),
    "no JSON": ({"image": "1.png", "text": "{"}, "`text` is no JSON (Expecting property name"),
}


@pytest.mark.parametrize(("row", "sentence"), BAD.values(), ids=BAD)
def test_a_picture_that_cannot_be_used_is_a_sentence_with_its_line(capsys, row, sentence):
    write_rows(Path("raw/rows.jsonl"), [asked("1.png"), row, asked("2.png")])
    words = ["--input", "raw/rows.jsonl", "--dimension", "helpful", *ALL_TRAIN]
    said = fails(capsys, *words)
    assert said.startswith(f"raw/rows.jsonl:2: {sentence}") and said.endswith(MEND)
    assert not Path("data").exists()
    prepare(*words, "--skip-invalid")
    assert counts(account()["rows"]["dropped"]) == {"the row is malformed": 1}
    assert account()["rows"]["used"] == 2


def test_is_response_safe_says_yes_or_no(capsys):
    write_rows(Path("raw/rows.jsonl"), [*beaver_v("1.png"), beaver_v("1.png")[0] | {"is_response_safe": "perhaps"}])
    assert fails(capsys, "--input", "raw/rows.jsonl") == (
        f"raw/rows.jsonl:3: `is_response_safe` is neither yes nor no{MEND}"
    )


# -- the folder --------------------------------------------------------------------------------------------------------


def test_pictures_of_an_earlier_run_go_and_no_others(capsys):
    words = ["--dimension", "helpful", *ALL_TRAIN]
    write_rows(Path("raw/old.jsonl"), [asked("1.png"), asked("2.png")])
    write_rows(Path("raw/new.jsonl"), [asked("2.png"), asked("3.png")])
    prepare("--input", "raw/old.jsonl", *words)
    assert account()["written"][f"images/{sha(1)}.png"] == sha(1)
    shutil.copy("raw/4.png", "data/images/mine.png")
    prepare("--input", "raw/new.jsonl", *words, "--overwrite")
    names = {path.name for path in Path("data/images").iterdir()}
    assert names == {"mine.png", f"{sha(2)}.png", f"{sha(3)}.png"}
    Path(f"data/images/{sha(3)}.png").write_bytes(data_of(5))
    assert "is not as account.json says it was written" in fails(
        capsys, "--input", "raw/old.jsonl", *words, "--overwrite"
    )


@pytest.mark.parametrize("number", range(1, 6))
def test_killed_while_pictures_are_put_in_place_the_next_start_finishes(number):
    """number: of the rename before which it is killed: the journal, two pictures, the pairs, the account."""
    words = ["--dimension", "helpful", *ALL_TRAIN, "--overwrite"]
    write_rows(Path("raw/old.jsonl"), [asked("1.png"), asked("2.png")])
    write_rows(Path("raw/new.jsonl"), [asked("2.png"), asked("3.png")])
    prepare("--input", "raw/old.jsonl", *words)
    code = fork(functools.partial(be_killed, number, ["--input", "raw/new.jsonl", *words]))
    assert code == -signal.SIGKILL
    prepare("--input", "raw/new.jsonl", *words)
    prepare("--input", "raw/new.jsonl", *words, "--output-dir", "other")
    assert snapshot("data") == snapshot("other")
    assert not Path("data/.prepare_data").exists()


# -- a dataset that decodes pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["image", "images"])
def test_pictures_of_a_dataset_are_the_bytes_of_their_files_and_not_decoded(seeing, column, monkeypatch):
    """The digest of a JPEG tells: nobody gets the same bytes from its pixels."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())
    picture_of(1).save("raw/1.jpg")
    data = Path("raw/1.jpg").read_bytes()
    one = {"bytes": data, "path": None}
    row = {column: one if column == "image" else [one], "question": "what?", "chosen": "a", "rejected": "b"}
    texts = {name: datasets.Value("string") for name in ("question", "chosen", "rejected")}
    kind = datasets.Image() if column == "image" else datasets.List(datasets.Image())
    Path("set").mkdir()
    made = datasets.Dataset.from_list([row], features=datasets.Features({column: kind} | texts))
    made.to_parquet("set/train.parquet")
    assert "PIL" in repr(made[0][column])
    digest = hashlib.sha256(data).hexdigest()

    tokenizer, reader = reader_of(seeing)
    ((seen,), _) = load_pairs("set", tokenizer, 512, 48, reader=reader)
    assert seen.pictures.digests == (digest,)
    assert seen.pictures.open()[1]["pixel_values"].shape == (1, 3, 32, 32)
    prepare("--input", "set", "--dimension", "helpful", *ALL_TRAIN)
    assert [path.name for path in Path("data/images").iterdir()] == [f"{digest}.jpg"]


def test_a_path_in_a_dataset_that_is_a_folder_is_relative_to_the_folder(seeing):
    pytest.importorskip("datasets")
    shutil.copytree("raw", "set/pictures")
    write_rows(Path("set/train.jsonl"), [asked("pictures/1.png")])
    tokenizer, reader = reader_of(seeing)
    ((seen,), _) = load_pairs("set", tokenizer, 512, 48, reader=reader)
    assert seen.pictures.digests == (sha(1),)
