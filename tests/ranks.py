"""Ranks for tests: processes forked from a server that has the scripts imported, so that each starts in a moment."""

import importlib
import os
import time
from multiprocessing import connection, forkserver, get_context
from pathlib import Path

import pytest
import torch
from helpers import TRAINERS
from runs import run_script

TESTS = Path(__file__).resolve().parent
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["ranks", *TRAINERS])
GRACE = 5  # seconds that the other ranks have to end once one has failed


def run_ranks(script, argv, ranks, out, timeout=120):
    """A script (name of its module) with the words `argv` on so many ranks, as `on_ranks`."""
    return on_ranks(run_module, (script, [str(word) for word in argv]), ranks, out, timeout)


def run_module(script, argv):
    """A script in this process, by its name."""
    run_script(argv, importlib.import_module(script))


def on_ranks(work, arguments, ranks, out, timeout=120):
    """work(*arguments) in so many processes with torchrun's variables; (exit codes, what each printed on both outputs).

    work: a function of a module in tests/.  The processes stand in the folder `out`, where rankN.txt is what rank N
    printed.  Those that have not ended after `timeout` seconds, or soon after one has failed, are killed (code -9).
    """
    start_server()
    Path(out).mkdir(parents=True, exist_ok=True)
    # The store that the ranks meet in is held here, as torchrun holds it: nobody else can take its port meanwhile.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [FORKS.Process(target=be_a_rank, args=(work, arguments, some, str(out))) for some in environments]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    while (alive := [process for process in processes if process.is_alive()]) and time.monotonic() < end:
        connection.wait([process.sentinel for process in alive], end - time.monotonic())
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + GRACE)
    for process in alive:
        process.kill()
    for process in processes:
        process.join(10)
    said = [(Path(out) / f"rank{rank}.txt").read_text("utf-8") for rank in range(ranks)]
    return [process.exitcode for process in processes], said


def start_server():
    """Start the server that processes are forked from, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read when torch is imported
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))  # sys.path does not reach it
        forkserver.ensure_running()


def be_a_rank(work, arguments, environment, out):
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.chdir(out)
    with open(f"rank{environment['RANK']}.txt", "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    work(*arguments)
