"""accelerate and deepspeed as launchers: all they do is start the processes.  And a MASTER_PORT that is taken."""

import os
import socket
import sys
import time

import pytest
from helpers import ROOT
from processes import end_of, run_program, start
from runs import adapter_of, metrics_of

TEXT = "Please answer politely and briefly."
SCRIPTS = {  # script -> flags
    "dpo_hf_run.py": "--dataset {toy}/train/helpful_pairs.jsonl".split(),
    "train_with_preference_prompt.py": ["--dataset-path", "{toy}/train/helpful_pairs.jsonl", "--preference-text", TEXT],
}


def words_of(script, toy):
    """Two updates of 8 pairs in two processes, of 4 in one."""
    words = [word.format(toy=toy) for word in SCRIPTS[script]]
    words += ["--model", f"{toy}/model", "--num-samples", "24", "--eval-samples", "0", "--max-steps", "2"]
    words += ["--batch-size", "2", "--gradient-accumulation-steps", "2", "--learning-rate", "1e-3"]
    return [*words, *"--dtype fp32 --report-to none --logging-steps 1 --output-dir out".split()]


def offline():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def check_result(folder, script):
    """Two updates have been logged, and the adapter has moved."""
    lines = metrics_of(folder / "out")
    assert [line["step"] for line in lines] == [1, 2]
    adapter = adapter_of(folder / "out")
    assert max(adapter[name].abs().max() for name in adapter if "lora_B" in name) > 1e-4
    assert (folder / "out" / script).exists()


def test_accelerate_launches_preference_guided_dpo(toy, tmp_path):  # and dpo_hf_run.py in test_ranks.py
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    # One process: on a CPU accelerate leaves more of them to MPI.
    launcher = "-m accelerate.commands.launch --cpu --num_processes=1 --num_machines=1 --mixed_precision=no".split()
    script = "train_with_preference_prompt.py"
    command = [sys.executable, *launcher, "--dynamo_backend=no", ROOT / script, *words_of(script, toy)]
    done = run_program(command, cwd=tmp_path, env=offline())
    assert done.returncode == 0, done.stderr
    check_result(tmp_path, script)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def deepspeed_gives(script, words, folder, port):
    """[(exit code, stdout, stderr)] of two processes started as `deepspeed --include=localhost:0,1` starts them.

    Environment, first argument and end are those of deepspeed/launcher/launch.py in github.com/deepspeedai/DeepSpeed
    (its `main`), which itself needs a GPU.  Each process has a folder of its own, unlike there, to show who writes.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
    shared |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}
    processes = []
    for rank in (0, 1):
        (folder / str(rank)).mkdir(exist_ok=True)
        processes.append(
            start(
                [sys.executable, "-u", ROOT / script, f"--local_rank={rank}", *words],
                cwd=folder / str(rank),
                env=offline() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
        )
    deadline = time.monotonic() + 200
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        failed = any(process.poll() for process in processes)
        time.sleep(1)  # as there: a process that is about to end may do so
        if failed:  # it ends the others
            break
    for process in processes:
        process.terminate()
    ended = [end_of(process) for process in processes]
    return [(done.returncode, done.stdout, done.stderr) for done in ended]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_deepspeed_starts_is_two_ranks(toy, tmp_path, script):
    words = [*words_of(script, toy), "--device", "cpu"]
    (code, out, err), (other_code, other_out, other_err) = deepspeed_gives(script, words, tmp_path, free_port())
    assert (code, other_code) == (0, 0), err + other_err
    assert "Distributed training initialized: world_size=2" in out
    assert "Effective batch size: 8 (batch_size=2 x accumulation=2 x 2 processes)" in out
    assert other_out == "" and list((tmp_path / "1").iterdir()) == [], "rank 0 alone writes"
    check_result(tmp_path / "0", script)


def test_a_mistake_that_all_ranks_see_is_told_once_under_torchrun(toy, tmp_path):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    words = [*words_of("dpo_hf_run.py", toy), "--dataset", "nowhere.jsonl", "--device", "cpu"]
    command = [sys.executable, *launcher, ROOT / "dpo_hf_run.py", *words]
    done = run_program(command, cwd=tmp_path, env=offline())
    assert done.returncode == 1, "torchrun's own, whatever that of the ranks was"
    assert sum(line.startswith("dpo_hf_run.py: ") for line in done.stderr.splitlines()) == 1, done.stderr


def test_a_mistake_that_one_rank_alone_sees_is_told_by_it(toy, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/pairs.jsonl").write_bytes((toy / "train/helpful_pairs.jsonl").read_bytes())
    words = [*words_of("dpo_hf_run.py", toy), "--dataset", "pairs.jsonl", "--device", "cpu"]
    first, (code, out, err) = deepspeed_gives("dpo_hf_run.py", words, tmp_path, free_port())
    assert (code, out) == (2, ""), first
    sentences = [line for line in err.splitlines() if line.startswith("dpo_hf_run.py: ")]
    assert len(sentences) == 1 and "pairs.jsonl" in sentences[0] and "Traceback" not in err


def test_a_master_port_that_is_taken_is_one_sentence_before_any_model_loads(tmp_path):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        words = ["--model", "nowhere", "--dataset", "nowhere", "--device", "cpu"]
        ended = deepspeed_gives("dpo_hf_run.py", words, tmp_path, port)
    code, out, err = ended[0]
    assert (code, out) == (2, "")
    assert [line for line in err.splitlines() if "dpo_hf_run.py" in line] == [
        f"dpo_hf_run.py: MASTER_PORT {port} is taken on this machine, by another run or program: set a free one "
        "(deepspeed: --master_port)"
    ]
    assert "Traceback" not in err and "EADDRINUSE" not in err
