"""Data that the optional package `datasets` reads: a dataset on a hub, streamed, or the folder it was downloaded to."""

import contextlib
import gzip
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlparse

import pytest
import requests
from found_files import lines_of, parquet
from helpers import ROOT
from processes import end_of, run_program, start
from runs import one_line, run_script
from worlds import CHATML, assistant, char_tokenizer, ids, load, strings, user, write_rows

from formats import hub_files
from formats.model_files import ModelError, load_tokenizer
from preference_data import DataError, Pair

try:
    import datasets
except ImportError:
    datasets = None
needs_datasets = pytest.mark.skipif(datasets is None, reason="the extra `hub` (datasets) is not installed")

needs_modelscope = pytest.mark.skipif(
    importlib.util.find_spec("modelscope_hub") is None, reason="the extra `modelscope` is not installed"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """`datasets` leaves lock files in its cache: not in the user's."""
    if datasets:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder, files):
    """A folder of {path: bytes or text}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def prompts(pairs):
    return ["".join(map(chr, pair.prompt_ids)) for pair in pairs]


def error(source, **options):
    with pytest.raises(DataError) as caught:
        load(source, **options)
    return str(caught.value)


ROWS = [strings(n) for n in range(8)]
TRAIN, TEST = ROWS[:5], ROWS[5:]
Q = [f"q{n}" for n in range(8)]  # their prompts
README = "---\nlicense: mit\n---\n# Pairs\n"
TWO_CONFIGS = """---
configs:
- config_name: helpful
  data_files: helpful.jsonl
- config_name: harmless
  data_files: harmless.jsonl
---
"""
NAMED_SPLITS = """---
configs:
- config_name: default
  data_files:
  - split: {first}
    path: a.jsonl
  - split: test
    path: b.jsonl
---
"""


# -- a folder with the files of a dataset -----------------------------------------------------------------------------


@needs_datasets
def test_a_downloaded_parquet_dataset_gives_its_train_split(tmp_path):
    files = {
        "README.md": README,
        ".gitattributes": "*.parquet filter=lfs\n",
        ".cache/huggingface/download/data/train-00000-of-00001.parquet.metadata": "a\nb\n1.0\n",
        "data/train-00000-of-00001.parquet": parquet(*TRAIN),
        "data/test-00000-of-00001.parquet": parquet(*TEST),
    }
    folder = write(tmp_path / "pairs", files)
    pairs, report = load(folder)
    assert pairs == [Pair(ids(f"q{n}"), [*ids(f" yes {n}"), 1], [*ids(f" no {n}"), 1]) for n in range(5)]
    assert report == [
        f"{folder}: prompt/chosen/rejected, 5 rows, 5 pairs",
        "  row 0 prompt      2 tokens  'q0'",
        "  row 0 chosen      7 tokens  ' yes 0</s>'",
        "  row 0 rejected    6 tokens  ' no 0</s>'",
    ]
    assert load(folder / "data")[0] == load(f"{folder}/")[0] == pairs


@needs_datasets
def test_a_snapshot_in_the_cache_of_the_hub_is_a_folder_of_links(tmp_path):
    write(tmp_path, {"blobs/1": parquet(*TRAIN), "snapshots/main/README.md": README})
    (tmp_path / "snapshots/main/data").mkdir()
    (tmp_path / "snapshots/main/data/train-00000-of-00001.parquet").symlink_to("../../../blobs/1")
    assert prompts(load(tmp_path / "snapshots/main")[0]) == Q[:5]


@pytest.mark.parametrize(
    "files",
    [
        {"train.jsonl": lines_of(*TRAIN), "test.jsonl": lines_of(*TEST)},
        {
            "train.jsonl.gz": gzip.compress(lines_of(*TRAIN).encode()),
            "test.jsonl.gz": gzip.compress(lines_of(*TEST).encode()),
        },
        {"train.json": json.dumps(TRAIN)},
        {"rows.jsonl": lines_of(*TRAIN)},
        {"a/train.jsonl": lines_of(*TRAIN[:2]), "b/train.jsonl": lines_of(*TRAIN[2:]), "b/test.jsonl": lines_of(*TEST)},
        {"README.md": NAMED_SPLITS.format(first="train"), "a.jsonl": lines_of(*TRAIN), "b.jsonl": lines_of(*TEST)},
    ],
    ids=["jsonl", "gzip", "list", "no split", "folders", "README names the splits"],
)
@needs_datasets
def test_a_folder_of_json_gives_its_train_split(tmp_path, files):
    assert prompts(load(write(tmp_path / "pairs", files))[0]) == Q[:5]


@pytest.mark.parametrize("name", ["pairs", "json", "parquet", "someone/some-pairs"])
@needs_datasets
def test_a_folder_is_itself_whatever_its_name_means_to_datasets_or_a_hub(tmp_path, monkeypatch, name):
    write(tmp_path, {"elsewhere/train.jsonl": lines_of(*TEST), f"{name}/train.jsonl": lines_of(*TRAIN)})
    monkeypatch.chdir(tmp_path)
    pairs, report = load(name)
    assert prompts(pairs) == Q[:5]
    assert report[0] == f"{name}: prompt/chosen/rejected, 5 rows, 5 pairs"


@needs_datasets
def test_the_default_dataset_may_lie_in_a_folder_of_its_name(tmp_path, monkeypatch):
    name = "lvwerra/stack-exchange-paired"
    write(
        tmp_path / name / "data", {"evaluation/train.jsonl": lines_of(*TEST), "finetune/train.jsonl": lines_of(*TRAIN)}
    )
    monkeypatch.chdir(tmp_path)
    assert prompts(load(name)[0]) == prompts(load(f"{name}/data/finetune")[0]) == Q[:5]


@needs_datasets
def test_messages_in_parquet_go_through_the_chat_template(tmp_path):
    row = {"prompt": [user("Q")], "chosen": [assistant("ab")], "rejected": [assistant("c")]}
    files = {"train.parquet": parquet(row), "rows/rows.jsonl": lines_of(row)}
    tokenizer = char_tokenizer(eos="<|im_end|>", template=CHATML)
    folder = write(tmp_path / "pairs", files)
    pairs, report = load(folder, tokenizer)
    assert pairs == load(folder / "rows/rows.jsonl", tokenizer)[0] and len(pairs) == 1
    assert report[0] == f"{folder}: prompt/chosen/rejected messages, 1 rows, 1 pairs"


@needs_datasets
def test_more_columns_of_any_type_are_no_matter(tmp_path):
    rows = [{"qid": n, "question": f"q{n}", "metadata": ["a"], "response_j": "y", "response_k": "n"} for n in range(3)]
    pairs, report = load(write(tmp_path / "pairs", {"train.parquet": parquet(*rows)}))
    assert prompts(pairs) == [f"Question: q{n}\n\nAnswer: " for n in range(3)]
    assert "question/response_j/response_k, 3 rows, 3 pairs" in report[0]


@needs_datasets
def test_another_split_becomes_a_file_as_the_documents_say(tmp_path):
    rows = [row | {"prompt": row["prompt"] + "?"} for row in TEST]
    folder = write(tmp_path / "pairs", {"train.parquet": parquet(*TRAIN), "test.parquet": parquet(*rows)})
    [command] = re.findall(r"-c \"import datasets; (.+)\"", (ROOT / "docs/data.md").read_text())
    command = command.replace("NAME", str(folder)).replace("pairs.jsonl", str(tmp_path / "pairs.jsonl"))
    exec(command, {"datasets": datasets})
    assert prompts(load(tmp_path / "pairs.jsonl")[0]) == ["q5?", "q6?", "q7?"]


# -- no more rows than asked ------------------------------------------------------------------------------------------


@needs_datasets
def test_only_as_many_rows_are_read_as_asked(tmp_path):
    # The second file is no parquet, so a look at its first row fails.
    files = {"data/train-00000-of-00002.parquet": parquet(*TRAIN), "data/train-00001-of-00002.parquet": b"no parquet"}
    folder = write(tmp_path / "pairs", files)
    for limit in (1, 4, 5):
        pairs, report = load(folder, limit=limit)
        assert prompts(pairs) == Q[:limit]
        assert report[0] == f"{folder}: prompt/chosen/rejected, {limit} rows (as many as asked for), {limit} pairs"
    for limit in (6, 0):
        assert error(folder, limit=limit).startswith(
            f"{folder} is a folder, and `datasets` reads no train split under that name (ArrowInvalid: "
        )


@needs_datasets
def test_a_text_of_many_blocks_is_not_read_to_its_end(tmp_path):
    rows = [strings(n) | {"chosen": f"{n}" + "x" * 10_000} for n in range(2500)]
    folder = write(tmp_path / "pairs", {"train.jsonl": lines_of(*rows) + "{no json\n"})  # 25 MB
    assert prompts(load(folder, limit=3)[0]) == Q[:3]


# -- rows that cannot be used -----------------------------------------------------------------------------------------


@needs_datasets
def test_a_null_is_malformed_and_names_its_row(tmp_path):
    folder = write(tmp_path / "pairs", {"train.parquet": parquet(*ROWS[:3], ROWS[3] | {"chosen": None}, *ROWS[4:])})
    mend = "mend the row, or leave such rows out with --skip-invalid"
    assert error(folder) == f"{folder}: row 3: `chosen` is not a str; {mend}"
    pairs, report = load(folder, skip_invalid=True)
    assert prompts(pairs) == Q[:3] + Q[4:]
    assert report[1] == (f"  left out 1 rows: 1 because malformed; the first is {folder}: row 3: `chosen` is not a str")


@needs_datasets
def test_columns_of_no_known_shape_are_named(tmp_path):
    folder = write(tmp_path / "pairs", {"data/train.parquet": parquet({"text": "x", "label": 1})})
    assert error(folder).startswith(
        f'{folder}: row 0 has the fields text, label (a number), which is no known shape; the nearest are {{"prompt"'
    )


# -- what cannot be read: one sentence --------------------------------------------------------------------------------

JSON_LINE = r"name a \.jsonl file \(docs/data\.md shows how to make one\)"


@pytest.mark.parametrize(
    "files, reason",
    [
        ({"data/test-00000-of-00001.parquet": "TEST"}, r"Available splits: \['test'\]"),
        ({"README.md": NAMED_SPLITS.format(first="train_prefs")}, r"Available splits: \['train_prefs', 'test'\]"),
        ({"README.md": TWO_CONFIGS}, r"available configs: \['helpful', 'harmless'\]"),
        ({}, "doesn't contain any data files"),
        ({"config.json": "{}", "model.safetensors": "x"}, r"No \(supported\) data files found"),
        ({"train.parquet": "no parquet"}, "ArrowInvalid: .*"),
        ({"train.jsonl": "{no json\n"}, "ArrowInvalid: JSON parse error: .*"),
        ({"train.jsonl.gz": gzip.compress(lines_of(*ROWS * 99).encode())[:300]}, ".*"),
        ({"README.md": "---\nconfigs: [\n---\n"}, ".*"),
        ({"README.md": "---\nconfigs: 3\n---\n"}, ".*"),
    ],
    ids=[
        "only test",
        "another name",
        "configs",
        "empty",
        "model",
        "no parquet",
        "no json",
        "gzip cut off",
        "README is no YAML",
        "README of another shape",
    ],
)
@needs_datasets
def test_a_folder_that_gives_no_train_split(tmp_path, files, reason):
    files = {name: parquet(*TEST) if content == "TEST" else content for name, content in files.items()}
    if "README.md" in files:
        files |= {f"{name}.jsonl": lines_of(*ROWS) for name in ("a", "b", "helpful", "harmless")}
    (tmp_path / "pairs").mkdir()
    folder = write(tmp_path / "pairs", files)
    line = error(folder)
    start = f"{folder} is a folder, and `datasets` reads no train split under that name ("
    assert line.startswith(start) and re.search(rf"{reason}.*\): {JSON_LINE}$", line)
    assert "\n" not in line and len(line) < len(str(folder)) + 400


@pytest.mark.parametrize("name", ["someone/some-pairs", "some-pairs", "some pairs"])
@needs_datasets
def test_a_name_that_no_hub_gives(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    line = error(name)
    start = rf"there is no file {name}, and `datasets` reads no train split under that name \(\w+Error: .+\): "
    assert re.fullmatch(start + r"name a \.jsonl file or a folder, or a mirror in HF_ENDPOINT", line)
    assert "\n" not in line


def test_without_the_package_one_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    advice = "name a .jsonl file, or install the extra hub (bash setup.sh hub, or pip install -U datasets)"
    line = f"there is no file someone/some-pairs, and what reads a dataset is missing: {advice}"
    assert error("someone/some-pairs") == line
    assert error(tmp_path) == f"{tmp_path} is a folder, and what reads a dataset is missing: {advice}"


def test_a_folder_named_datasets_is_not_the_package(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    write_rows((write(tmp_path, {"datasets/x": ""}) / "datasets") / "rows.jsonl", ROWS)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "install the extra hub" in error("someone/some-pairs")
    assert prompts(load(tmp_path / "datasets/rows.jsonl")[0]) == Q


@needs_datasets
def test_the_script_takes_a_folder_and_its_mistake_is_exit_code_2(world, tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "pairs", {"data/train-00000-of-00001.parquet": parquet(*ROWS), "other/x.txt": "x"})
    words = ["--model", world / "model", "--device", "cpu", "--dtype", "fp32", "--report-to", "none", "--max-steps", 1]
    words += ["--eval-samples", 2, "--output-dir", tmp_path / "out"]
    run_script([*words, "--dataset", folder, "--num-samples", 6])
    out = capsys.readouterr().out
    assert f"{folder}: prompt/chosen/rejected, 6 rows (as many as asked for), 6 pairs\n" in out
    assert "held out 2 pairs by whole prompts, 4 to train on\n" in out
    with pytest.raises(SystemExit) as exit:
        run_script([*words, "--dataset", folder / "other", "--overwrite"])
    assert exit.value.code == 2
    assert one_line(capsys).startswith(f"dpo_hf_run.py: {folder}/other: row 0 has the fields text, which is no known")


# -- a hub: the packages that ask it are the real ones, and the hub is a server on this machine -----------------------


class Hub(BaseHTTPRequestHandler):
    """What a dataset's clients ask of huggingface.co: its card, the list of its files, and parts of them."""

    protocol_version = "HTTP/1.1"
    name, files, served = "", {}, []  # served: (path, bytes) of every part that was sent

    def log_message(self, *_):
        pass

    def answer(self, status, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entries(self, keep):
        """Its files and folders whose path is kept."""
        folders = {str(folder) for path in self.files for folder in PurePosixPath(path).parents} - {"."}
        for path in sorted(filter(keep, folders | set(self.files))):
            kind = {"type": "directory"} if path in folders else {"type": "file", "size": len(self.files[path])}
            yield {"path": path, "oid": "b" * 40, **kind}

    def do_POST(self):  # about paths that are named
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self.answer(200, list(self.entries(lambda path: path in asked)))

    def do_GET(self):
        path, _, query = unquote(self.path).partition("?")
        if re.fullmatch(rf"/api/datasets/{self.name}(/revision/\w+)?", path):
            siblings = [{"rfilename": file} for file in self.files]
            return self.answer(200, {"id": self.name, "sha": "a" * 40, "private": False, "siblings": siblings})
        if match := re.fullmatch(rf"/api/datasets/{self.name}/tree/\w+/?(.*)", path):
            inside = f"{match[1]}/".lstrip("/") + (".+" if "recursive=true" in query.lower() else "[^/]+")
            entries = list(self.entries(partial(re.fullmatch, inside)))
            return self.answer(200, entries) if entries else self.answer(404, {}, **NO_ENTRY)
        match = re.fullmatch(rf"/datasets/{self.name}/resolve/\w+/(.+)", path)
        if not match or match[1] not in self.files:
            return self.answer(404, {}, **NO_ENTRY if f"/{self.name}/" in path else NO_REPOSITORY)
        content, part = self.files[match[1]], slice(None)
        headers = {"ETag": f'"{len(content)}"', "X_Repo_Commit": "a" * 40, "Accept_Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            part = slice(int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content)))
            headers["Content_Range"] = f"bytes {part.start}-{part.stop - 1}/{len(content)}"
        if self.command == "GET":
            self.served.append((match[1], len(content[part])))
        self.answer(206 if asked else 200, content[part], **headers)

    do_HEAD = do_GET


NO_ENTRY, NO_REPOSITORY = {"X_Error_Code": "EntryNotFound"}, {"X_Error_Code": "RepoNotFound"}


@pytest.fixture(scope="module")
def hub_runs(world, tmp_path_factory):
    """The script against that hub: its default dataset, one that is not there, and a folder that is not whole."""
    folder = tmp_path_factory.mktemp("hub")

    def rows(kind):
        both = [{"response_j": f"yes {n}", "response_k": f"no {n}"} for n in range(100)]
        return parquet(*({"qid": n, "question": f"{kind} {n}", "date": ""} | row for n, row in enumerate(both)))

    Hub.name, Hub.served = "lvwerra/stack-exchange-paired", []
    Hub.files = {"README.md": README.encode()}
    for kind in ("evaluation", "finetune", "reward", "rl"):  # the folders of the real one
        Hub.files |= {f"data/{kind}/train-{part:05d}-of-00003.parquet": rows(kind) for part in range(3)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE") and not key.startswith("HF_")
    } | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    words = ["--model", world / "model", "--device", "cpu", "--dtype", "fp32", "--report-to", "none"]
    words += ["--num-samples", 20, "--max-steps", 1]
    broken = write(folder / "pairs", {"train.parquet": "no parquet"})
    cases = {"default": [], "missing": ["--dataset", "someone/some-pairs"], "broken": ["--dataset", broken]}
    running = {
        name: start(
            [sys.executable, ROOT / "dpo_hf_run.py", *words, *more, "--output-dir", folder / name],
            env=environment,
            cwd=folder,
        )
        for name, more in cases.items()
    }
    ended = {name: end_of(process) for name, process in running.items()}
    server.shutdown()
    server.server_close()
    return folder, {name: (done.stdout, done.stderr, done.returncode) for name, done in ended.items()}


def asking(words, folder, **variables):
    """The script to its end, in a process that knows no hub but those of the variables."""
    environment = {key: value for key, value in os.environ.items() if not re.match("HF_|MODELSCOPE_|.*OFFLINE", key)}
    environment |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "HF_HOME": str(folder / "home")} | variables
    environment |= {"MODELSCOPE_CACHE": str(folder / "cache"), "MODELSCOPE_HOME": str(folder / "modelscope")}
    words = [*words, "--device", "cpu", "--report-to", "none", "--max-steps", 1, "--output-dir", folder / "out"]
    return run_program([sys.executable, ROOT / "dpo_hf_run.py", *words], env=environment, cwd=folder)


@pytest.fixture
def hole():
    """(URL of a server that takes connections and says nothing, the connections it took)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []

        def take():
            with contextlib.suppress(OSError):  # closed
                while True:
                    taken.append(server.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", taken


@pytest.mark.parametrize("what", ["model", pytest.param("dataset", marks=needs_datasets)])
def test_a_hub_that_does_not_answer_is_asked_once(world, hole, tmp_path, what):
    url, taken = hole
    names = {"model": world / "model", "dataset": world / "pairs.jsonl"} | {what: "someone/something"}
    done = asking(["--model", names["model"], "--dataset", names["dataset"]], tmp_path, HF_ENDPOINT=url)
    which = "no tokenizer at someone/something" if what == "model" else "there is no file someone/something"
    assert done.stderr == (
        f"dpo_hf_run.py: {which}: it is not in the cache, and {url} does not answer (timed out): set HF_ENDPOINT to a "
        "mirror, pass --hub modelscope to have it from ModelScope, or name a file or folder\n"
    )
    assert (done.returncode, len(taken)) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_the_time_that_a_hub_has_for_its_answer(hole, monkeypatch):
    began = time.perf_counter()
    assert hub_files._no_answer(requests.head, hole[0]) == "ReadTimeout"
    assert 5 <= time.perf_counter() - began < 7
    monkeypatch.setattr(hub_files, "SECONDS", 0.1)  # and a look-up of its name that does not end
    assert hub_files._no_answer(lambda *_, **__: time.sleep(9), "http://x") == "nothing within 0.1 s"
    assert time.perf_counter() - began < 9


@pytest.mark.parametrize(
    "name, path",
    [
        *(
            ("/no/model", True),
            ("./model", True),
            ("../model", True),
            ("~/model", True),
            ("a/b/c", True),
            ("a/b/", True),
        ),
        *(("gpt2", False), ("Qwen/Qwen3-0.6B", False)),
    ],
)
def test_what_can_only_be_a_folder_is_asked_of_no_hub(name, path):
    assert hub_files.is_path(name) == path
    if path:
        with pytest.raises(ModelError, match=rf"^there is no folder {re.escape(name)}: check the path$"):
            load_tokenizer(name)


# -- ModelScope: the package that asks it is the real one too ---------------------------------------------------------


class ModelScope(BaseHTTPRequestHandler):
    """What modelscope-hub asks of modelscope.cn: lists of files, and files."""

    protocol_version = "HTTP/1.1"
    repositories, served = {}, []  # {"models/owner/name": {path: bytes}}

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlparse(self.path)
        match = re.fullmatch(r"/api/v1/(\w+/\w+/[\w-]+)/repo(/files|/tree)?", url.path)
        files = self.repositories.get(match and match[1])
        if files is None:
            self.answer(404, json.dumps({"Code": 404, "Message": "record not found", "Success": False}).encode())
        elif match[2]:
            listed = [{"Path": path, "Type": "blob", "Size": len(content)} for path, content in files.items()]
            self.answer(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": listed}}).encode())
        else:
            [path] = parse_qs(url.query)["FilePath"]
            self.served.append(path)
            self.answer(200, files[path])

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture
def modelscope(world):
    """The URL of such a server, with a model and pairs."""
    model = {path.name: path.read_bytes() for path in (world / "model").iterdir()} | {"model.gguf": b"unread"}
    pairs = {"README.md": README.encode(), "train.jsonl": lines_of(*ROWS).encode(), "test.jsonl": b"{}\n"}
    ModelScope.repositories = {"models/someone/tiny-model": model, "datasets/someone/some-pairs": pairs}
    ModelScope.served = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), ModelScope)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FROM_MODELSCOPE = ["--hub", "modelscope", "--model", "someone/tiny-model", "--eval-samples", 0, "--dtype", "fp32"]


@needs_datasets
@needs_modelscope
def test_a_model_and_pairs_from_modelscope_are_trained_on_and_kept(modelscope, hole, tmp_path):
    words = [*FROM_MODELSCOPE, "--dataset", "someone/some-pairs"]
    done = asking(words, tmp_path, HF_ENDPOINT=hole[0], MODELSCOPE_ENDPOINT=modelscope)
    assert (done.returncode, done.stderr) == (0, "")
    assert "someone/some-pairs: prompt/chosen/rejected, 8 rows, 8 pairs\n" in done.stdout
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny-model"
    assert ModelScope.served[-1] == "model.safetensors"  # behind all that can be wrong with the rows
    assert "model.gguf" not in ModelScope.served and len(set(ModelScope.served)) == len(ModelScope.served)
    # Without an answer, from its cache.
    done = asking([*words, "--overwrite"], tmp_path, HF_ENDPOINT=hole[0], MODELSCOPE_ENDPOINT=hole[0])
    assert (done.stderr, done.returncode, len(hole[1])) == ("", 0, 1)


@needs_modelscope
@pytest.mark.parametrize("silent", [False, True])
def test_what_modelscope_does_not_give_is_one_sentence(modelscope, hole, tmp_path, world, silent):
    url = hole[0] if silent else modelscope
    words = ["--hub", "modelscope", "--model", "someone/nothing", "--dataset", world / "pairs.jsonl"]
    done = asking(words, tmp_path, MODELSCOPE_ENDPOINT=url)
    reason = f"it is not in the cache, and {url} does not answer (ReadTimeout)"
    reason = reason if silent else "[E3020] [404] record not found | code=404"
    advice = "check the name, set MODELSCOPE_ENDPOINT, or name a file or folder"
    assert done.stderr == f"dpo_hf_run.py: no model someone/nothing from ModelScope ({reason}): {advice}\n"
    assert done.returncode == 2


def test_without_its_package_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    monkeypatch.setattr(hub_files, "_hub", "modelscope")
    with pytest.raises(ModelError) as caught:
        load_tokenizer("someone/absent")
    advice = "bash setup.sh modelscope, or pip install modelscope-hub"
    assert str(caught.value) == (
        f"someone/absent is to come from ModelScope, and what downloads it is missing: {advice}"
    )


@needs_datasets
def test_the_default_dataset_is_streamed_from_a_hub_and_trained_on(hub_runs):
    folder, outcomes = hub_runs
    out, err, code = outcomes["default"]
    assert code == 0, err
    assert (
        "lvwerra/stack-exchange-paired: question/response_j/response_k, 20 rows (as many as asked for), 20 pairs\n"
        in out
    )
    assert "'Question: finetune 0\\n\\nAnswer: '" in out
    assert "held out 2 pairs by whole prompts, 18 to train on\n" in out
    assert (folder / "default/adapter_model.safetensors").exists()
    assert "Traceback" not in err


@needs_datasets
def test_nothing_but_the_first_file_of_the_default_dataset_is_asked_for(hub_runs):
    assert {path for path, _ in Hub.served} - {"README.md"} == {"data/finetune/train-00000-of-00003.parquet"}
    downloaded = [path for path in Path(hub_runs[0] / "home").rglob("*") if path.suffix in (".parquet", ".arrow")]
    assert downloaded == []


@pytest.mark.parametrize(
    "name, what, reason, advice",
    [
        (
            "missing",
            "there is no file someone/some-pairs",
            "DatasetNotFoundError: Dataset 'someone/some-pairs' doesn't exist on the Hub or cannot be accessed.",
            "name a .jsonl file or a folder, or a mirror in HF_ENDPOINT",
        ),
        (  # `datasets` logs by itself what it finds in such a file
            "broken",
            "{folder}/pairs is a folder",
            "ArrowInvalid: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a "
            "parquet file.",
            "name a .jsonl file (docs/data.md shows how to make one)",
        ),
    ],
)
@needs_datasets
def test_a_process_says_one_sentence(hub_runs, name, what, reason, advice):
    folder, outcomes = hub_runs
    _, err, code = outcomes[name]
    what = what.format(folder=folder)
    assert err == (f"dpo_hf_run.py: {what}, and `datasets` reads no train split under that name ({reason}): {advice}\n")
    assert (code, (folder / name).exists()) == (2, False)
