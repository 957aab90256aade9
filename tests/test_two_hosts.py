"""Two machines in miniature: two network namespaces of this one, each with an address of its own, and torchrun across
them from a node list, as the wrappers print and start it.  A tool named ssh stands for ssh: it runs a command in the
namespace of the address that it is given.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, copy_code
from machines import RewardMachine, write_tool
from processes import end_of, run_program, start
from runs import adapter_of

pytestmark = pytest.mark.slow

FIRST, SECOND = "10.77.0.1", "10.77.0.2"
NODES = f"{FIRST}:0@{SECOND}:0"
IP = shutil.which("ip", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
# The name of a machine is often 127.0.1.1 on it, which is where gloo would wait for the others.
TOLD = {"GLOO_SOCKET_IFNAME": "pair0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def ip(*words, check=True):
    done = run_program([IP, *words], limit=30)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    """Two namespaces, joined by a pair of virtual network devices."""

    def __init__(self):
        self.name = f"two-hosts-{os.getpid()}"

    def of(self, address):
        return f"{self.name}-{address}"

    def make(self):
        """Raises OSError where this user may not."""
        for address in (FIRST, SECOND):
            ip("netns", "add", self.of(address))
            ip("netns", "exec", self.of(address), "true")
            ip("-n", self.of(address), "link", "set", "lo", "up")
        ends = ("type", "veth", "peer", "name", "pair0", "netns", self.of(SECOND))
        ip("link", "add", "pair0", "netns", self.of(FIRST), *ends)
        for address in (FIRST, SECOND):
            ip("-n", self.of(address), "addr", "add", f"{address}/24", "dev", "pair0")
        self.plug("up")

    def plug(self, state):
        """The cable between them, up or down."""
        for address in (FIRST, SECOND):
            ip("-n", self.of(address), "link", "set", "pair0", state)

    def kill(self, address):
        """SIGKILL to every process of a host."""
        for pid in ip("netns", "pids", self.of(address), check=False).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass

    def remove(self):
        for address in (FIRST, SECOND):
            self.kill(address)
            ip("netns", "del", self.of(address), check=False)


@pytest.fixture(scope="module")
def hosts():
    if IP is None:
        pytest.skip("there is no ip (iproute2) to make network namespaces with")
    made = Hosts()
    try:
        try:
            made.make()
        except OSError as error:
            pytest.skip(f"network namespaces are not allowed here: {error}")
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def machine(hosts, tmp_path_factory):
    """The project in one folder, which both hosts see, as machines that share a disk do."""
    machine = RewardMachine(tmp_path_factory.mktemp("shared"))
    copy_code(machine.folder)
    shutil.copytree(ROOT / "configs", machine.folder / "configs")
    machine.make_venv(f'exec {sys.executable} "$@"')
    write_tool(machine.tools / "ssh", f'exec {IP} netns exec "{hosts.name}-${{@: -2:1}}" bash -c "${{@: -1}}"')
    return machine


def words_of(toy, out, accumulation=1):
    """40 updates of 8 pairs in two processes, a checkpoint after every second."""
    data = ["--train-helpful-path", toy / "train/helpful_pairs.jsonl", "--val-helpful-path"]
    data += [toy / "val/helpful_pairs.jsonl", "--num-samples", 320, "--eval-samples", 8]
    size = ["--batch-size", 4, "--gradient-accumulation-steps", accumulation, "--lora-dropout", 0, "--save-steps", 2]
    how = ["--device", "cpu", "--dtype", "fp32", "--report-to", "none", "--output-dir", out]
    return ["helpful", *map(str, ["--model", toy / "model", *data, *size, *how])]


@pytest.fixture(scope="module")
def whole(toy, machine):
    """The run on both hosts, started by the wrapper: (adapter, standard output)."""
    code, out, err = machine.run(*words_of(toy, "whole"), variables=TOLD | {"GPU_NODES": NODES, "LAUNCH": "ssh"})
    assert code == 0, out + err
    return adapter_of(machine.folder / "whole"), out


def test_a_run_on_two_hosts(machine, whole):
    adapter, out = whole
    assert out.count("Distributed training initialized: world_size=2") == 1
    assert out.count("Effective batch size: 8 (batch_size=4 x accumulation=1 x 2 processes)") == 1
    assert "step 40 " in out and "saved to whole" in out
    assert max(adapter[name].abs().max() for name in adapter if "lora_B" in name) > 1e-3
    assert "world_size=2" in (machine.folder / "logs/training/rm/helpful/train.log").read_text()
    for host in (FIRST, SECOND):
        assert f"# on {host}:\n" in out


def started(machine, toy, out, *words):
    """The printed commands, each given to its host: {address: process}; returns after the first checkpoint."""
    lines = machine.printed(*words_of(toy, out), *words, GPU_NODES=NODES, **TOLD).splitlines()
    processes = {}
    for heading, line in zip(lines[::2], lines[1::2], strict=True):
        address = re.fullmatch("# on (.*):", heading)[1]
        command = [machine.tools / "ssh", address, f"cd {machine.folder} && {line}"]
        processes[address] = start(command, env=os.environ | TOLD, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (machine.folder / out / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return processes


def ending(process):
    """(exit code, standard error) of a host that has a minute to end by itself."""
    done = end_of(process, 60)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def killed(toy, machine, hosts):
    """What becomes of the second host when the first, with rank 0, is killed: (exit code, standard error)."""
    processes = started(machine, toy, "killed", "--ddp-timeout", "600")
    hosts.kill(FIRST)
    code, err = ending(processes[SECOND])
    assert ending(processes[FIRST])[0] == -signal.SIGKILL
    assert not (machine.folder / "killed/adapter_model.safetensors").exists(), "it had ended before the kill"
    return code, err


GOES_ON = "see what that one said last; --resume auto goes on from the last checkpoint"


def test_a_host_that_is_killed_ends_the_other_with_one_sentence(killed):
    code, err = killed
    assert code == 1
    sentence = rf"^train_rm.py: rank 1 cannot reach another \(.*{re.escape(FIRST)}.*\): {GOES_ON}$"
    assert len(re.findall(sentence, err, re.MULTILINE)) == 1, err
    assert "all_reduce_gradients" not in err, "no traceback of ours"


def test_a_cut_cable_ends_both_hosts_after_the_timeout(toy, machine, hosts):
    processes = started(machine, toy, "cut", "--ddp-timeout", "10")
    hosts.plug("down")
    try:
        ends = [ending(processes[address]) for address in (FIRST, SECOND)]
    finally:
        hosts.plug("up")
    for rank, (code, err) in enumerate(ends):
        assert code == 1
        assert f"train_rm.py: rank {rank} cannot reach another (Timed out waiting 10000ms for " in err
        assert GOES_ON in err
    assert not (machine.folder / "cut/adapter_model.safetensors").exists(), "it had ended before the cut"


def test_one_host_goes_on_alone_and_it_is_the_same_run(toy, machine, whole, killed):
    words = [*words_of(toy, "killed", accumulation=2), "--resume", "auto"]  # as many pairs per update
    code, out, err = machine.run(*words, variables=TOLD | {"GPU_NODES": f"{SECOND}:0", "LAUNCH": "ssh"})
    assert code == 0, out + err
    assert "resumed from killed/checkpoint-" in out and "world_size" not in out
    assert "Effective batch size: 8 (batch_size=4 x accumulation=2 x 1 processes)" in out
    ours, theirs = adapter_of(machine.folder / "killed"), whole[0]
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
