"""A run that is killed and resumed is the uninterrupted run, bit for bit, wherever it was killed; a checkpoint that is
damaged, half-written or another run's is never used.
"""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import on_ranks, run_module, run_ranks
from runs import ask_to_end, flip, one_line, results, run_script, snapshot
from safetensors.torch import save_file

import distributed
import lora
from formats.model_files import load_model
from harness.checkpoints import CheckpointError, checkpoints, find, new_checkpoint, restore, rng_state, verify

# 9 updates of 2 pairs.  LoRA dropout makes every update depend on the state of chance.
FLAGS = """--dtype fp32 --device cpu --eval-samples 4 --eval-steps 5 --num-samples 22 --learning-rate 1e-3
    --batch-size 1 --gradient-accumulation-steps 2 --lora-dropout 0.2 --logging-steps 2 --report-to none
    --save-steps 3""".split()


@pytest.fixture(scope="module")
def words(world, tmp_path_factory):
    """Flags of the run but for its folder."""
    cache = tmp_path_factory.mktemp("cache")
    return ["--model", world / "model", "--dataset", world / "pairs.jsonl", "--cache-dir", cache, *FLAGS]


@pytest.fixture(scope="module")
def uninterrupted(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    run_script([*words, "--output-dir", folder])
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-9", "checkpoint-6", "checkpoint-3"]
    return results(folder)


def be_killed(call, number, threads, argv):
    """dpo_hf_run.py until SIGKILL at its step `number`, or at that call of os.fsync or os.replace for a checkpoint."""
    torch.set_num_threads(threads)  # another number of threads adds in another order
    module = torch.optim.AdamW if call == "step" else os
    plain, calls = getattr(module, call), []

    def killer(*given, **named):
        path = os.readlink(f"/proc/self/fd/{given[0]}") if call == "fsync" else str(given[0])
        calls.extend([path] * (call == "step" or ".checkpoint-" in path))  # logs and curves are written beside
        if len(calls) == number and calls[-1:] == [path]:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*given, **named)

    setattr(module, call, killer)
    run_script(argv)


@pytest.mark.parametrize(
    ("call", "number", "goes_on_from"),
    [
        ("step", 2, None),  # before the first checkpoint
        ("step", 6, "checkpoint-3"),  # in an update
        ("fsync", 4, None),  # in the first save, its manifest written and its folder not renamed
        (
            "replace",
            4,
            "checkpoint-3",
        ),  # in the second save, at the rename of its folder; each renames its manifest too
        ("step", 9, "checkpoint-6"),  # in the last update
    ],
)
def test_killed_and_resumed_is_uninterrupted(words, uninterrupted, tmp_path, capsys, call, number, goes_on_from):
    out = tmp_path / "out"
    argv = [str(word) for word in [*words, "--output-dir", out]]
    codes, said = on_ranks(be_killed, (call, number, torch.get_num_threads(), argv), 1, tmp_path)
    assert codes == [-signal.SIGKILL], said
    assert not (out / "adapter_model.safetensors").exists()
    capsys.readouterr()
    run_script([*words, "--output-dir", out, "--resume", "auto"])
    log = capsys.readouterr().out
    assert (f"resumed from {out / goes_on_from}" if goes_on_from else "starting anew") in log
    assert results(out) == uninterrupted
    assert not list(out.glob(".*")), "what the killed run left half-written is gone"


def test_a_second_ctrl_c_ends_at_once(words, uninterrupted, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        ask_to_end(patch, 5, signal.SIGINT, signal.SIGINT)
        run_script([*words, "--output-dir", tmp_path / "out"])
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("SIGINT: saves and ends") and second.endswith(
        ": interrupted; --resume auto goes on from the last checkpoint"
    )
    assert ended.value.code == 130 and signal.getsignal(signal.SIGINT) is not signal.SIG_DFL
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"] and not list(
        tmp_path.glob("out/.*")
    )
    run_script([*words, "--output-dir", tmp_path / "out", "--resume", "auto"])
    assert results(tmp_path / "out") == uninterrupted


def test_two_ranks_end_together_at_ctrl_c_and_go_on(words, uninterrupted, tmp_path):
    """Each rank of a machine gets the signal, in an update of its own."""
    out = tmp_path / "out"
    codes, said = on_ranks(ask_a_rank, ([str(word) for word in [*words, "--output-dir", out]],), 2, tmp_path)
    assert codes == [130, 130], said
    sentence = f"{out}/checkpoint-2 is written: the same command with --resume auto goes on"
    assert said[0].splitlines()[-1] == f"SIGINT: ended after step 2, {sentence}"
    codes, said = run_ranks("dpo_hf_run", [*words, "--output-dir", out, "--resume", "auto"], 2, tmp_path)
    assert codes == [0, 0], said
    codes, said = run_ranks("dpo_hf_run", [*words, "--output-dir", tmp_path / "whole"], 2, tmp_path)
    assert results(out) == results(tmp_path / "whole")


def ask_a_rank(argv):
    with pytest.MonkeyPatch.context() as patch:
        ask_to_end(patch, 2 if os.environ["RANK"] == "1" else 3, signal.SIGINT)
        run_module("dpo_hf_run", argv)


def test_a_run_killed_before_its_first_checkpoint_begins_anew_and_no_other(words, uninterrupted, tmp_path, refused):
    """What is another run: other flags that matter, a file of the user's, or one that is finished."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        ask_to_end(patch, 2, signal.SIGINT, signal.SIGINT)
        run_script([*words, "--output-dir", out])
    assert (out / "metrics.jsonl").exists() and not checkpoints(out)
    assert "holds a run" in refused(out, resume="none")
    assert "holds a run" in refused(out, "--learning-rate", "2e-3")
    args = (out / "args.json").read_text()
    (out / "args.json").write_text(args + " ")
    assert "args.json, which manifest.json does not list as it is" in refused(out)
    (out / "args.json").write_text(args)
    (out / "notes.txt").write_text("mine")
    run_script([*words, "--output-dir", out, "--resume", "auto", "--logging-steps", "2"])
    assert results(out) == uninterrupted and (out / "notes.txt").read_text() == "mine"


def test_resume_from_a_named_checkpoint_into_another_folder(words, uninterrupted, tmp_path):
    run_script([*words, "--output-dir", tmp_path / "one", "--max-steps", "9"])
    # 9 is all there is, but a limit that was not there is another schedule as far as a checkpoint can tell.
    resume = ["--output-dir", tmp_path / "two", "--resume", tmp_path / "one/checkpoint-3"]
    with pytest.raises(SystemExit) as refused:
        run_script([*words, *resume, "--max-steps", "0"])
    assert refused.value.code == 2
    run_script([*words, "--output-dir", tmp_path / "three"])
    run_script([*words, "--output-dir", tmp_path / "four", "--resume", tmp_path / "three/checkpoint-3"])
    assert results(tmp_path / "four") == uninterrupted


def test_two_ranks_resume_with_a_state_of_chance_each(words, tmp_path):
    def train(name, *more):
        codes, said = run_ranks("dpo_hf_run", [*words, "--output-dir", tmp_path / name, *more], 2, tmp_path)
        assert codes == [0, 0], said
        return results(tmp_path / name)

    assert train("one") == train("two", "--resume", tmp_path / "one/checkpoint-3")


@pytest.mark.parametrize("bytes_more", [0, 16, -16], ids=["as saved", "on a GPU", "on a CPU"])
def test_another_kind_of_device_draws_chance_anew_and_says_so(bytes_more, tmp_path, capsys):
    """A GPU's state stands behind the CPU's: of a run on another kind of device the two are longer or shorter."""
    world, parameter = distributed.start("cpu"), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parts = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), torch.amp.GradScaler("cpu", enabled=False)
    torch.manual_seed(5)
    state = rng_state(world.device)
    drawn = torch.rand(4)
    saved = state[:bytes_more] if bytes_more < 0 else torch.cat((state, state[:bytes_more]))
    save_file({"parameter.0": torch.ones(2), "rng_state": saved[None]}, tmp_path / "training.safetensors")
    content = {"step": 3, "rates": [0.1], "scheduler": parts[1].state_dict(), "scaler": parts[2].state_dict()}
    (tmp_path / "state.json").write_text(json.dumps(content))
    restore(tmp_path, [parameter], *parts, world)
    assert torch.equal(torch.rand(4), drawn) == (bytes_more == 0)
    said = "dropout is drawn anew: the checkpoint is of another number of ranks or another kind of device\n"
    assert capsys.readouterr().out == (said if bytes_more else "")
    assert parameter.tolist() == [1, 1]


def test_save_total_limit_keeps_the_newest(words, tmp_path):
    run_script([*words, "--output-dir", tmp_path / "out", "--save-total-limit", "2"])
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-9", "checkpoint-6"]


def test_a_checkpoint_is_safetensors_and_json_and_an_adapter_that_loads(words, world, tmp_path):
    run_script([*words, "--output-dir", tmp_path / "out"])
    last = checkpoints(tmp_path / "out")[0]
    assert {path.suffix for path in last.iterdir()} == {".safetensors", ".json"}
    model = load_model(world / "model", torch.float32, "cpu")
    assert len(lora.load_adapter(model, last, "policy")) == 28
    assert (last / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "out/adapter_model.safetensors"
    ).read_bytes()


# -- checkpoints that must not be used --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    run_script([*words, "--output-dir", folder])
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run with its checkpoints, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


DAMAGE = {
    "torn": lambda last: os.truncate(last / "training.safetensors", 100),
    "one bit": lambda last: flip(last / "training.safetensors"),
    "state": lambda last: (last / "state.json").write_text("{}"),
    "a file is missing": lambda last: (last / "adapter_model.safetensors").unlink(),
    "no manifest": lambda last: (last / "manifest.json").unlink(),
    "a manifest of nothing": lambda last: (last / "manifest.json").write_text("{}"),
    "no JSON": lambda last: (last / "manifest.json").write_text("[1"),
    "deep JSON": lambda last: (last / "manifest.json").write_text("[" * 100_000),
    "without end": lambda last: ((last / "manifest.json").unlink(), os.mkfifo(last / "manifest.json")),
    "a file without end": lambda last: ((last / "state.json").unlink(), os.mkfifo(last / "state.json")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(copy, words, uninterrupted, capsys, damage):
    last = checkpoints(copy)[0]
    DAMAGE[damage](last)
    run_script([*words, "--output-dir", copy, "--resume", "auto"])
    log = capsys.readouterr().out
    assert f"passed over: {last}" in log
    assert f"resumed from {copy / 'checkpoint-6'}" in log
    assert results(copy) == uninterrupted


@pytest.fixture
def refused(words, capsys):
    """refused(folder, flags ...) -> the sentence of a resume that ends with exit code 2 and changes nothing."""

    def run(folder, *more, resume="auto"):
        before = snapshot(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            run_script([*words, "--output-dir", folder, "--resume", resume, *more])
        assert error.value.code == 2
        assert snapshot(folder) == before
        return one_line(capsys)

    return run


def test_a_checkpoint_of_another_script_is_refused(copy, refused):
    last = checkpoints(copy)[0]
    state = json.loads((last / "state.json").read_text())
    state["identity"]["script"] = "train_rm.py"
    (last / "state.json").write_text(json.dumps(state))
    manifest = json.loads((last / "manifest.json").read_text())
    shutil.rmtree(last)
    with new_checkpoint(copy, 9, 0) as folder:
        shutil.copytree(copy / "checkpoint-6", folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        (folder / "state.json").write_text(json.dumps(state))
    assert manifest.keys() == json.loads((copy / "checkpoint-9/manifest.json").read_text()).keys()
    assert "script was train_rm.py and is dpo_hf_run.py" in refused(copy)


def test_a_named_checkpoint_that_is_damaged_is_an_error(copy, refused):
    os.truncate(copy / "checkpoint-3/training.safetensors", 10)
    assert "checkpoint-3 is damaged: training.safetensors" in refused(copy, resume=copy / "checkpoint-3")
    assert "is no whole checkpoint" in refused(copy, resume=copy / "checkpoint-4")


def test_resume_auto_does_not_start_anew_over_a_run_without_checkpoints(copy, refused):
    for folder in checkpoints(copy):
        shutil.rmtree(folder)
    assert "holds a run and no checkpoint of it to go on from (metrics.jsonl)" in refused(copy)


def test_a_run_killed_in_its_final_save_begins_anew_where_it_has_no_checkpoint(copy, words, uninterrupted):
    for folder in checkpoints(copy):
        shutil.rmtree(folder)
    (copy / ".saving-x").mkdir()
    (copy / "adapter_model.safetensors").replace(copy / ".saving-x/adapter_model.safetensors")
    run_script([*words, "--output-dir", copy, "--resume", "auto"])
    assert results(copy) == uninterrupted and not (copy / ".saving-x").exists()


def test_a_run_killed_between_its_first_two_files_begins_anew(words, uninterrupted, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        ask_to_end(patch, 1, signal.SIGINT, signal.SIGINT)
        run_script([*words, "--output-dir", tmp_path])
    for path in tmp_path.iterdir():
        if path.is_file() and path.name != "manifest.json":
            path.unlink()
    run_script([*words, "--output-dir", tmp_path, "--resume", "auto"])
    assert results(tmp_path) == uninterrupted


@pytest.mark.parametrize("left", ["half of it", "its folder"])
def test_what_a_kill_left_of_an_old_checkpoint_goes(copy, words, left):
    for path in (copy / "checkpoint-3").iterdir():
        if left == "its folder" or path.name == "training.safetensors":
            path.unlink()
    run_script([*words, "--output-dir", copy, "--resume", "auto", "--save-total-limit", "2"])
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-9", "checkpoint-6"]


def test_of_changed_logs_the_lines_that_can_be_read_are_kept(copy, words, uninterrupted, capsys):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(["{", *lines, '{"step": 1e999}', '{"step": "x"}', "7"]))
    run_script([*words, "--output-dir", copy, "--resume", copy / "checkpoint-6"])
    said = f"{copy}/metrics.jsonl is not as checkpoint-6 has noted it: what can be read of it up to step 6 is kept"
    assert said in capsys.readouterr().out.splitlines()
    assert results(copy) == uninterrupted


def test_a_checkpoint_without_its_logs_goes_on_without_them(copy, words, uninterrupted, tmp_path):
    (copy / "checkpoint-6").rename(tmp_path / "checkpoint-6")
    run_script([*words, "--output-dir", tmp_path / "other", "--resume", tmp_path / "checkpoint-6"])
    metrics, weights = results(tmp_path / "other")
    lines = uninterrupted[0].splitlines(keepends=True)
    assert metrics == b"".join(line for line in lines if json.loads(line)["step"] > 6)
    assert weights == uninterrupted[1]


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run(words, uninterrupted, tmp_path, monkeypatch, capsys):
    plain = os.fsync

    def full(handle):
        if ".checkpoint-6.unfinished" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(handle)

    monkeypatch.setattr(os, "fsync", full)
    run_script([*words, "--output-dir", tmp_path / "out"])
    log = capsys.readouterr().out
    assert "checkpoint-6 could not be written" in log and "No space left on device" in log
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-9", "checkpoint-3"]
    assert results(tmp_path / "out") == uninterrupted


def test_a_full_disk_at_the_end_keeps_the_checkpoints_and_says_so(words, uninterrupted, tmp_path, monkeypatch, capsys):
    plain, out = os.fsync, tmp_path / "out"

    def full(handle):
        if "adapter_model.safetensors" in (path := os.readlink(f"/proc/self/fd/{handle}")) and ".saving-" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(handle)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(os, "fsync", full)
        run_script([*words, "--output-dir", out])
    way_on = "; --resume auto goes on from the last checkpoint"
    assert ended.value.code == 2 and one_line(capsys) == (
        f"dpo_hf_run.py: {out}: No space left on device: make room there, or choose another place{way_on}"
    )
    assert not (out / "adapter_model.safetensors").exists() and not list(out.glob(".*"))
    run_script([*words, "--output-dir", out, "--resume", "auto"])
    assert results(out) == uninterrupted


class Windows:
    """os as it is there: no folder can be opened, and fsync wants a handle that can write."""

    name, synced = "nt", 0

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os.open(path, flags)

    def fsync(self, handle):
        import fcntl  # not there

        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self.synced += 1
        os.fsync(handle)


def test_a_checkpoint_on_windows(tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="the stand-in for Windows needs another system")
    windows = Windows()
    monkeypatch.setattr("formats.written_files.os", windows)
    with new_checkpoint(tmp_path, 3, 0) as folder:
        for name in ("state.json", "training.safetensors"):
            (folder / name).write_text("{}")
    assert windows.synced == 4, "both files, and the manifest as a draft and in place"
    verify(tmp_path / "checkpoint-3")


def test_a_save_that_breaks_off_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_checkpoint(tmp_path, 3, 0) as folder:
        (folder / "state.json").write_text("{}")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"../secret": {"size": 1, "sha256": ""}}))
    with pytest.raises(CheckpointError):
        verify(folder)
    assert find(tmp_path, "auto", lambda text: None) is None


def test_resume_into_a_folder_that_holds_another_run_is_refused(copy, refused, words, tmp_path):
    run_script([*words, "--output-dir", tmp_path / "other", "--max-steps", "2"])
    assert "holds a run" in refused(tmp_path / "other", resume=copy / "checkpoint-3")


def test_the_limit_never_removes_the_checkpoint_just_written_nor_a_copy_with_another_name(copy, words):
    flip(copy / "checkpoint-9/training.safetensors")
    shutil.copytree(copy / "checkpoint-3", copy / "checkpoint-3-best")
    run_script([*words, "--output-dir", copy, "--resume", "auto", "--save-steps", "2", "--save-total-limit", "1"])
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-9", "checkpoint-8"]
    verify(copy / "checkpoint-8")
    verify(copy / "checkpoint-3-best")
