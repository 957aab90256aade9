"""Files of the user's stay, whatever a run writes or replaces; what a run wrote is known to be that when it is read."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import fork
from ranks import on_ranks
from runs import RESULTS, assert_same_files, one_line, run_script, snapshot
from worlds import make_adapter, make_reward_model, write_world

import dpo_hf_run
import evaluate_alignment
import generate
import learn_prompt
import lora
import reward_models
import train_rm
import train_safe_mm_dpo
import train_with_preference_prompt
from formats import written_files
from formats.model_files import ModelError, load_model, load_tokenizer
from harness import metrics_log, run_files

TRAIN = "--device cpu --dtype fp32 --report-to none --max-steps 1 --eval-samples 0 --logging-steps 1".split()
SAFE = "--train-helpful-path {world}/pairs.jsonl --train-harmless-path {world}/pairs.jsonl".split()
SAFE += "--helpful-rm-path {world}/helpful --harmless-rm-path {world}/harmless".split()
PROMPT = "--dataset-path {world}/pairs.jsonl --preference-text polite".split()
SCRIPTS = {  # a run of each that would work, but for what a test changes
    dpo_hf_run: ["--dataset", "{world}/pairs.jsonl", *TRAIN],
    train_rm: ["--task", "helpful", "--train-helpful-path", "{world}/pairs.jsonl", *TRAIN],
    train_safe_mm_dpo: [*SAFE, *TRAIN],
    train_with_preference_prompt: [*PROMPT, *TRAIN],
    learn_prompt: [*PROMPT, *TRAIN],
    evaluate_alignment: "--prompts {world}/pairs.jsonl --num-samples 1 --max-new-tokens 2 --device cpu".split(),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("world"))
    make_adapter(folder / "model", folder / "adapter")
    for task in ("helpful", "harmless"):
        make_reward_model(folder / "model", folder / task)
        record = json.loads((folder / task / "reward_model.json").read_text())
        (folder / task / "reward_model.json").write_text(json.dumps(record | {"task": task}))
    return folder


def refused(script, words, capsys, monkeypatch):
    """The sentence of a run that has to end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(words, script)
    assert ended.value.code == 2
    return one_line(capsys)


# -- an output that is an input ---------------------------------------------------------------------------------------

FOLDERS = {  # every flag that names a folder: what it names in the world
    dpo_hf_run: {"model": "model", "adapter": "adapter", "ref-model-path": "model", "resume": "checkpoint-1"},
    train_rm: {"model": "model", "tokenizer-name": "model"},
    train_safe_mm_dpo: {
        **{"model": "model", "ref-model-path": "model"},
        **{"helpful-rm-path": "helpful", "harmless-rm-path": "harmless"},
    },
    train_with_preference_prompt: {"model": "model", "ref-model-path": "model"},
    learn_prompt: {"model": "model"},
    evaluate_alignment: {
        **{"model": "model", "adapters": "adapter"},
        **{"helpful-rm-path": "helpful", "harmless-rm-path": "harmless"},
    },
}


def spelled(folder, how, tmp_path):
    if how == "link":
        (tmp_path / "link").symlink_to(folder)
        return tmp_path / "link"
    return {"plain": folder, "dots": folder / ".." / folder.name, "relative": os.path.relpath(folder)}[how]


OUTPUTS = dict.fromkeys(SCRIPTS, ["output-dir", "cache-dir", "logging-dir"])
OUTPUTS |= {train_rm: ["output-dir", "logging-dir"], evaluate_alignment: ["output-dir"]}
CASES = [
    (s, flag, name, output) for s, flags in FOLDERS.items() for flag, name in flags.items() for output in OUTPUTS[s]
]


@pytest.mark.parametrize(
    ("script", "flag", "name", "output"), CASES, ids=[f"{case[0].__name__} {case[1]} {case[3]}" for case in CASES]
)
def test_an_output_that_is_an_input_is_refused(world, capsys, monkeypatch, tmp_path, script, flag, name, output):
    read = tmp_path / "read"
    write_checkpoint(read) if flag == "resume" else shutil.copytree(world / name, read)
    before = snapshot(read)
    for how in ["plain", "dots", "relative", "link"] if output == "output-dir" else ["plain"]:
        words = [word.format(world=world) for word in ["--model", "{world}/model", *SCRIPTS[script], "--overwrite"]]
        words += ["--output-dir", tmp_path / "out", f"--{flag}", read, f"--{output}", spelled(read, how, tmp_path)]
        sentence = refused(script, words, capsys, monkeypatch)
        assert f"--{output} " in sentence and f" is --{flag} {read}, which is read: choose another place" in sentence
        assert snapshot(read) == before
        assert not (tmp_path / "out").exists()


def write_checkpoint(folder):
    folder.mkdir()
    for name in ("training.safetensors", "state.json"):
        (folder / name).write_text("")
    written_files.write(folder, written_files.entries(folder))


@pytest.mark.parametrize("inside", ["merged", "epoch_1", "checkpoint-2"])
def test_an_input_that_would_be_replaced_in_the_output_is_refused(world, tmp_path, capsys, monkeypatch, inside):
    folder = tmp_path / "out" / inside
    shutil.copytree(world / "model", folder)
    words = ["--model", folder, "--dataset", world / "pairs.jsonl", *TRAIN, "--output-dir", tmp_path / "out"]
    sentence = refused(dpo_hf_run, [*words, "--overwrite"], capsys, monkeypatch)
    assert f"--model {folder} is read, and would be replaced in --output-dir {tmp_path}/out" in sentence
    assert (folder / "config.json").exists()


def test_data_of_the_users_in_the_output_folder_is_read_and_stays(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    data = shutil.copy(world / "pairs.jsonl", out / "mine.jsonl")
    words = ["--model", world / "model", "--dataset", data, *TRAIN, "--output-dir", out]
    for more in ([], ["--overwrite"]):
        run_script([*words, *more])
        assert Path(data).read_bytes() == (world / "pairs.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flag", "value"),
    [("prompts", "{0}"), ("reward-fn", "{0}:polite"), ("model", "{0}"), ("adapter", "{0}"), ("reward-model", "{0}")],
)
@pytest.mark.parametrize("link", [False, True])
def test_generate_never_writes_over_what_it_reads(world, tmp_path, capsys, monkeypatch, flag, value, link):
    file = tmp_path / "rules.py"
    file.write_text("def polite(prompt, response):\n    return 1.0\n")
    output = tmp_path / "hard.jsonl" if link else file
    if link:
        os.link(file, output)
    (tmp_path / f"{output.name}.args.json").write_text(json.dumps({"identity": {}, "progress": {"bytes": 0}}))
    words = ["--model", world / "model", "--prompts", world / "pairs.jsonl", "--output", output, "--overwrite"]
    before = snapshot(tmp_path)
    sentence = refused(generate, [*words, f"--{flag}", value.format(file)], capsys, monkeypatch)
    assert f"{output} would be read and written at once" in sentence
    assert snapshot(tmp_path) == before


# -- --overwrite ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """run(flags ...) -> what a run of dpo_hf_run.py into tmp_path/out says."""

    def start(*more):
        capsys.readouterr()
        words = [
            "--model",
            world / "model",
            "--dataset",
            world / "pairs.jsonl",
            *TRAIN,
            "--output-dir",
            tmp_path / "out",
        ]
        run_script([*words, *more])
        return capsys.readouterr().out

    return start


def test_overwrite_takes_what_a_run_wrote_and_leaves_the_rest(run, tmp_path):
    out = tmp_path / "out"
    run("--save-merged", "--save-steps", "1", "--report-to", "auto")
    mine = ["notes.txt", "merged/notes.txt", "checkpoint-1/notes.txt", "logs/mine.txt", "deep/er/adapter_config.json"]
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    said = run("--overwrite", "--lora-r", "0")
    kept = "checkpoint-1, deep, logs, merged, notes.txt"
    assert f"left alone: {kept} (not written by a run, or changed since)" in said
    assert [(out / name).read_text() for name in mine] == ["mine"] * len(mine)
    left = {name for name in snapshot(out) if not name.startswith("cache/")} - set(mine)
    model = {"config.json", "generation_config.json", "model.safetensors"}
    rest = "tokenizer.json tokenizer_config.json chat_template.jinja trainer_state.json metrics.jsonl args.json"
    assert left == model | {*rest.split(), "dpo_hf_run.py", "README.md", "curves.html", "manifest.json"}


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "args.json", "metrics.jsonl", "dpo_hf_run.py"])
def test_a_file_that_was_changed_since_is_not_replaced(run, tmp_path, capsys, name):
    run()
    path = tmp_path / "out" / name
    path.write_text(path.read_text() + " ")
    before = snapshot(tmp_path / "out")
    with pytest.raises(SystemExit):
        run("--overwrite")
    assert f"holds {name}, which manifest.json does not list as it is and may be yours: move it" in one_line(capsys)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "tokenizer.json", "merged/config.json"])
def test_without_a_record_nothing_is_replaced(run, tmp_path, capsys, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit):
            run(*more)
        assert "--output-dir" in one_line(capsys)
    assert snapshot(tmp_path / "out").keys() == {name}


def test_a_record_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "out").mkdir()
    listed = {"../secret": written_files.entry(tmp_path / "secret")}
    for name in ("../secret", str(tmp_path / "secret")):
        written_files.write(tmp_path / "out", {name: listed["../secret"]})
        written_files.remove(tmp_path / "out")
        assert (tmp_path / "secret").exists()


def test_old_checkpoints_go_and_the_users_files_in_them_stay(run, tmp_path):
    run("--save-steps", "1", "--max-steps", "3")
    (tmp_path / "out/checkpoint-1/notes.txt").write_text("mine")
    (tmp_path / "out/checkpoint-3/notes.txt").write_text("mine")
    (tmp_path / "out/checkpoint-3/training.safetensors").write_text("torn")
    run("--save-steps", "1", "--max-steps", "3", "--resume", "auto", "--save-total-limit", "1")
    assert (tmp_path / "out/checkpoint-1/notes.txt").read_text() == "mine"
    assert (tmp_path / "out/checkpoint-3/notes.txt").read_text() == "mine"
    assert written_files.damage(tmp_path / "out/checkpoint-3", "*") is None


# -- what is read is what was written ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """{kind: folder of a run}: a policy's adapter and whole model, a reward model as an adapter and whole."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    for kind, script, more in (
        ("adapter", dpo_hf_run, []),
        ("policy", dpo_hf_run, ["--lora-r", "0"]),
        ("reward adapter", train_rm, []),
        ("reward model", train_rm, ["--lora-r", "0"]),
        ("soft prompt", learn_prompt, []),
    ):
        found[kind] = folder / kind.replace(" ", "_")
        words = [word.format(world=world) for word in SCRIPTS[script]]
        run_script(["--model", world / "model", *words, "--output-dir", found[kind], *more], script)
    return found | {"tokenizer": found["policy"]}


def read(kind, folder, world):
    """Load what is in a folder, as a script does before it uses it."""
    if kind == "soft prompt":
        from preference_prompt import read_soft_prompt

        return read_soft_prompt(folder, 32)
    if kind == "policy":
        return load_model(folder, torch.float32, "cpu")
    if kind == "tokenizer":
        return load_tokenizer(folder)
    if kind == "adapter":
        return lora.load_adapter(load_model(world / "model", torch.float32, "cpu"), folder, "policy")
    return reward_models.read_record(folder, "helpful", load_tokenizer(world / "model"))


BYTES = {  # one bit of a file, at several places of it
    "adapter": ["adapter_model.safetensors", "adapter_config.json"],
    "policy": ["model.safetensors", "config.json"],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
    "reward adapter": ["adapter_model.safetensors", "adapter_config.json", "reward_model.json"],
    "reward model": ["model.safetensors", "config.json", "reward_model.json"],
    "soft prompt": ["adapter_model.safetensors", "adapter_config.json"],
}


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in BYTES.items() for name in names])
def test_one_changed_bit_is_found(saved, world, tmp_path, kind, name, place):
    folder = Path(shutil.copytree(saved[kind], tmp_path / "copy"))
    read(kind, folder, world)  # a copy is as good as the original
    content = bytearray((folder / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    (folder / name).write_bytes(content)
    errors = lora.AdapterError, ModelError, reward_models.RewardModelError, ValueError
    with pytest.raises(errors, match=f"{name} is not (what was written there|the file that)"):
        read(kind, folder, world)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_reward_models_record_knows_its_files_without_a_manifest(saved, world, tmp_path, name):
    folder = Path(shutil.copytree(saved["reward adapter"], tmp_path / "copy"))
    (folder / "manifest.json").unlink()
    read("reward adapter", folder, world)
    (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b" ")
    with pytest.raises(reward_models.RewardModelError, match="its reward_model.json was written for"):
        read("reward adapter", folder, world)


def test_an_adapter_from_elsewhere_needs_no_record(saved, world, tmp_path):
    for name in written_files.ADAPTER:
        shutil.copy(saved["adapter"] / name, tmp_path)
    assert len(read("adapter", tmp_path, world)) == 28
    (tmp_path / "manifest.json").write_text('{"name": "an app", "icons": []}')  # of another program
    assert len(read("adapter", tmp_path, world)) == 28


@pytest.mark.parametrize("script", [train_safe_mm_dpo, generate, evaluate_alignment], ids=lambda s: s.__name__)
def test_scripts_refuse_a_changed_reward_model(saved, world, tmp_path, capsys, monkeypatch, script):
    folder = Path(shutil.copytree(saved["reward adapter"], tmp_path / "rm"))
    content = bytearray((folder / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(content)
    if script is generate:
        words = ["--prompts", world / "pairs.jsonl", "--output", tmp_path / "o.jsonl", "--reward-model", folder]
        words += ["--max-new-tokens", "4"]
    else:
        words = [word.format(world=world) for word in SCRIPTS[script]]
        words += ["--helpful-rm-path", folder, "--output-dir", tmp_path / "out"]
    sentence = refused(script, ["--model", world / "model", *words], capsys, monkeypatch)
    assert f"{folder}/adapter_model.safetensors is not the file that its reward_model.json was written for" in sentence
    assert not (tmp_path / "out").exists() and not (tmp_path / "o.jsonl").exists()


# -- killed while it saves --------------------------------------------------------------------------------------------


def kill_at(number, save):
    """Whether save() ends, in a process of its own that is killed at its call `number` to the file system."""
    calls = []

    def killed():

        def watched(plain):
            def call(*given, **named):
                calls.append(1)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*given, **named)

            return call

        for name in "replace rename unlink mkdir rmdir fsync".split():
            setattr(os, name, watched(getattr(os, name)))
        save()

    return fork(killed) == 0


@pytest.mark.parametrize("kind", ["adapter", "policy", "reward adapter", "reward model", "soft prompt"])
def test_killed_anywhere_in_a_save_the_old_or_the_new_is_there_or_it_is_refused(saved, world, tmp_path, kind):
    """The new one has other weights and another record; what is read is never of both."""
    names = {*BYTES[kind], "tokenizer.json", "tokenizer_config.json"} & {path.name for path in saved[kind].iterdir()}
    new = tmp_path / "new"
    new.mkdir()
    for name in names:
        shutil.copy(saved[kind] / name, new)
    weights = next(new.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    if "reward" in kind:
        record = json.loads((new / "reward_model.json").read_text()) | {"sha256": reward_models.files_sha256(new)}
        (new / "reward_model.json").write_text(json.dumps(record | {"validation": {"loss": 0.25}}))
    states = [{name: (folder / name).read_bytes() for name in names} for folder in (saved[kind], new)]

    def save():
        with run_files.whole_files(out) as draft:
            shutil.copytree(new, draft, dirs_exist_ok=True)

    outcomes = []
    for number in range(1, 200):
        out = Path(shutil.copytree(saved[kind], tmp_path / f"out{number}"))
        if kill_at(number, save):
            break
        try:
            read(kind, out, world)
        except (lora.AdapterError, ModelError, reward_models.RewardModelError, ValueError):
            outcomes.append("refused")
        else:
            needed = BYTES[kind]
            found = {name: (out / name).read_bytes() for name in needed}
            outcomes.append([found == {name: state[name] for name in needed} for state in states].index(True))
        listed = written_files.read(out)  # and nothing is listed that is not as one of the two
        for name in names & listed.keys():
            if (out / name).exists() and written_files.is_as_listed(out / name, listed[name]):
                assert (out / name).read_bytes() in [state[name] for state in states]
        assert all(written_files.is_as_listed(out / n, listed[n]) for n in listed if (out / n).exists()), "ours"
    assert len(outcomes) > 3 * len(names) and {0, "refused"} <= set(outcomes)
    assert read(kind, out, world) and (out / weights.name).read_bytes() == bytes(content)


def test_killed_while_it_replaces_an_old_run_the_next_one_replaces_the_rest(saved, world, tmp_path):
    """What is left is known as written: --overwrite goes through, and a file of the user's stays."""
    for number in range(1, 100):
        out = Path(shutil.copytree(saved["adapter"], tmp_path / f"out{number}"))
        (out / "notes.txt").write_text("mine")
        args = dpo_hf_run.get_args(["--output-dir", str(out), "--report-to", "none", "--overwrite"])

        def start(args=args):
            run_files.check_output(args)
            metrics_log.MetricsLog(args, is_main=True).close()

        ended = kill_at(number, start)
        start()
        assert {name for name in snapshot(out) if not name.startswith("cache/")} == {
            *("notes.txt", "args.json", "metrics.jsonl", "manifest.json")
        }
        assert (out / "notes.txt").read_text() == "mine"
        if ended:
            break
    assert number > 15


def be_killed(number, threads, argv):
    """train_rm.py until SIGKILL at the rename of its `number`-th reward_model.json."""
    torch.set_num_threads(threads)  # another number of threads adds in another order
    plain, calls = os.rename, []

    def rename(source, target):
        calls.extend([target] * str(target).endswith("reward_model.json"))
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(source, target)

    os.rename = rename
    run_script(argv, train_rm)


def test_a_reward_model_killed_between_two_files_is_refused_and_mended_by_resume(world, tmp_path, capsys):
    data = world / "pairs.jsonl"
    words = ["--task", "helpful", "--model", world / "model", "--train-helpful-path", data, "--val-helpful-path", data]
    words += "--device cpu --dtype fp32 --report-to none --logging-steps 1 --save-steps 2 --epochs 3".split()
    words += "--eval-samples 8 --batch-size 8 --gradient-accumulation-steps 1 --learning-rate 1e-2".split()
    run_script([*words, "--output-dir", tmp_path / "whole"], train_rm)
    best = capsys.readouterr().out.count("Saving best model")
    assert best > 1
    out = tmp_path / "out"
    argv = [str(word) for word in [*words, "--output-dir", out]]
    codes, said = on_ranks(be_killed, (best, torch.get_num_threads(), argv), 1, tmp_path)
    assert codes == [-signal.SIGKILL], said
    with pytest.raises(reward_models.RewardModelError):
        read("reward adapter", out, world)
    run_script([*words, "--output-dir", out, "--resume", "auto"], train_rm)
    assert_same_files(out, tmp_path / "whole", [*RESULTS, "adapter_config.json", "reward_model.json"])
    assert not list(out.glob(".*")), "what the killed run left half-written is gone"
