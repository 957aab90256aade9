"""A folder of fake tools that stands for a machine: nvidia-smi that lists GPUs, ssh that runs a command here, a .venv
whose python writes down what it was called with.
"""

import glob
import shutil
from pathlib import Path

from helpers import ROOT
from processes import run_program

CONF = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
NOTE = "fast_train.sh: no GPU here, MODEL_PATH is as it was: the toy world, with settings that it learns from\n"
NO_GPU = "there is no GPU to be seen here"
FOR_ANOTHER = f"{NO_GPU}: the command is for a machine that has them"
# Where something stands for a GPU and no nvidia-smi counts them, a wrapper cannot say that there is none.
SOME_GPU = any(glob.glob(device) for device in ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg"))
SOLO, TORCHRUN = ".venv/bin/python", ".venv/bin/python -m torch.distributed.run"
ONE_NODE = f"{TORCHRUN} --standalone"
TOOLS = "bash cat cksum dirname env grep mkdir sed sleep sort tee touch"


def write_tool(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


class Machine:
    """A copy of the scripts on a machine of its own: its GPUs (None: without a tool that counts them), its name."""

    script = "fast_train.sh"

    def __init__(self, folder):
        self.folder, self.tools = folder / "project", folder / "tools"
        (self.folder / "scripts").mkdir(parents=True)
        self.tools.mkdir()
        for name in (self.script, "setup.sh", "requirements.txt", "pyproject.toml", "scripts/gpu_nodes.sh"):
            shutil.copy(ROOT / name, self.folder / name)
        for name in TOOLS.split():
            (self.tools / name).symlink_to(shutil.which(name))

    def make_venv(self, python):
        """A .venv that setup.sh finds whole, with `python`, the text of a shell script."""
        write_tool(self.folder / ".venv/bin/python", python)
        key = "cat requirements.txt pyproject.toml | cksum >.venv/core.stamp"
        assert run_program(["bash", "-c", key], cwd=self.folder).returncode == 0

    def run(self, *words, gpus=None, variables=None):
        """(exit code, stdout, stderr) of fast_train.sh, called from another folder."""
        smi = self.tools / "nvidia-smi"
        smi.unlink(missing_ok=True)
        if gpus is not None:
            lines = "".join(f"GPU {n}: NVIDIA H (UUID: GPU-{n})\\n  MIG 1g.5gb Device 0:\\n" for n in range(gpus))
            write_tool(smi, f"printf '{lines}'")
        environment = {"PATH": str(self.tools), "HOSTNAME": "here.lan", "HOME": "/", "LC_ALL": "C.UTF-8"}
        environment |= variables or {}
        done = run_program(["bash", self.folder / self.script, *words], cwd="/", env=environment)
        return done.returncode, done.stdout, done.stderr

    def printed(self, *words, gpus=None, **variables):
        """What --dry-run prints on stdout, without its line ends at the end."""
        code, out, err = self.run("--dry-run", *words, gpus=gpus, variables=variables)
        noted = "", NOTE, f"{Path(self.script).name}: {FOR_ANOTHER}\n"
        assert code == 0 and err in noted, err
        return out.rstrip("\n")

    def refused(self, *words, gpus=None, **variables):
        """The one sentence on stderr, without the script's name."""
        code, out, err = self.run(*words, gpus=gpus, variables=variables)
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        assert not (self.folder / ".venv").exists()  # setup.sh has not run
        return err.removeprefix(f"{Path(self.script).name}: ").rstrip("\n")


NODES = "--nnodes=2 --node-rank={} --master-addr=node1 --master-port=29400"
RECORDS = """if [ "$1" = -c ]; then exit 0; fi  # setup.sh asks for the packages
printf '%s\\0' "$PYTORCH_CUDA_ALLOC_CONF" "$CUDA_VISIBLE_DEVICES" "$@" >>"$PWD/called"
"""


def calls(machine):
    return (machine.folder / "called").read_text().split("\0")[:-1]


class RewardMachine(Machine):
    script = "scripts/train_rm_distributed.sh"


class PolicyMachine(Machine):
    script = "scripts/train_dpo_distributed.sh"
