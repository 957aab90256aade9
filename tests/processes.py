"""Programs that tests start, and forks.  Each has a limit: past it, it and all that it started are killed, and the test
fails with what was said.
"""

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

LIMIT = 300  # seconds; a run on the toy world takes some 30 where nothing else runs


def environment(**variables):
    """This process's, offline and on one thread, where programs can import the project and what stands in tests/."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables


# What bitsandbytes says on a CPU with AVX512-BF16 where transformers imports PEFT and PEFT imports it: both are here as
# yardsticks and are none of what a user needs.
FOREIGN = "Failed to load CPU gemm_4bit_forward from kernels-community: "


def run_program(words, limit=LIMIT, **options):
    """A program to its end: returncode, stdout, stderr (text).  `options` are those of subprocess.Popen."""
    return end_of(start(words, **options), limit)


def start(words, **options):
    """A program as a process, both outputs into pipes."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([str(word) for word in words], **options)


def end_of(process, limit=LIMIT):
    """returncode, stdout, stderr of a started program."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired as late:
        kill_all_of(process.pid)
        process.wait(timeout=10)
        out, err = ((part or b"").decode(errors="replace")[-2000:] for part in (late.stdout, late.stderr))
        words = " ".join(process.args)[:500]
        pytest.fail(f"not ended after {limit} s: {words}\nstdout: ...{out}\nstderr: ...{err}", pytrace=False)
    err = "".join(line for line in (err or "").splitlines(keepends=True) if not line.startswith(FOREIGN))
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill_all_of(pid):
    """SIGKILL to a process and what it started, in whatever session: torchrun gives each rank one of its own."""
    children = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    for child in children:
        kill_all_of(int(child))


def fork(work, limit=60):
    """The exit code of work() in a fork of this process; 0 where it returns or raises."""
    ended, held = os.pipe()  # the fork holds one end until it is gone
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.close(held)
    in_time = select.select([ended], [], [], limit)[0]
    os.close(ended)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert in_time, f"a fork has not ended after {limit} s"
    return code
