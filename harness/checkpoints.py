"""Checkpoints that are whole or not there, and a resumed run that is the uninterrupted one.

A checkpoint is written to a temporary folder beside its place, a manifest with the size and sha256 of every file last,
and renamed once; older ones go after that.  What is not renamed does not count, and what does not match its manifest
is passed over with its reason.  Only safetensors and JSON: nothing that is read can run.

    training.safetensors   trained weights and the optimiser's moments, the RNG state of every rank, sums to log
    state.json             where the run stands, the schedule, the scaler, and what the run is (`identity`)
    manifest.json          size and sha256 of the others
"""

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

import distributed
from formats import written_files
from formats.tensor_files import load_file, save_file
from formats.user_errors import UserError
from harness import endings


class CheckpointError(UserError):
    """A checkpoint that cannot be used: one sentence for the user."""


# -- files ---------------------------------------------------------------------------------------------------------


@contextmanager
def new_checkpoint(output_dir, step, total_limit):
    """A folder to fill, which becomes `output_dir`/checkpoint-`step`; keeps the newest `total_limit` (0: all).

    An error in the block or a full disk leaves the older checkpoints as they are.
    """
    output_dir = Path(output_dir)
    unfinished, final = output_dir / f".checkpoint-{step}.unfinished", output_dir / f"checkpoint-{step}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        written_files.write(unfinished, written_files.entries(unfinished))
        for path in (*unfinished.iterdir(), unfinished):
            written_files.sync(path)
        written_files.remove(final)
        if final.exists():  # a damaged one, or a file of the user's is in it
            written_files.put(unfinished, final)
        else:
            os.replace(unfinished, final)
        written_files.sync(output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    remove_older(output_dir, step, total_limit)


def remove_older(output_dir, step, total_limit):
    """Keep the newest `total_limit` (0: all) of the checkpoints up to `step`; what a kill left of others goes too.

    A newer one stays: it is damaged, and was passed over.
    """
    found = [path for path in checkpoints(output_dir) if _step(path) <= step]
    for path in found[total_limit:] if total_limit else ():
        written_files.remove(path)
        with suppress(OSError):  # something of the user's is in it
            path.unlink() if path.is_symlink() else path.rmdir()


def checkpoints(output_dir):
    """The checkpoint folders of a run, newest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[len("checkpoint-") :].isdecimal()]
    return sorted(found, key=_step, reverse=True)


def _step(folder):
    return int(folder.name[len("checkpoint-") :])


def verify(folder):
    """Raise CheckpointError unless every file is there as its manifest says."""
    if not {"training.safetensors", "state.json"} <= (listed := written_files.read(folder)).keys():
        raise CheckpointError(f"{folder} is no whole checkpoint (its manifest.json is missing, or not one)")
    for name, entry in listed.items():
        if not written_files.is_as_listed(folder / name, entry):
            raise CheckpointError(f"{folder} is damaged: {name} is not what was written")


def find(output_dir, resume, say):
    """The folder to resume from for --resume none|auto|PATH, or None; `say` gets the reason for each passed over.

    auto takes the newest that is whole, and None when there is none.  Raises CheckpointError for a PATH that is not.
    """
    if resume == "none":
        return None
    if resume != "auto":
        verify(Path(resume))
        return Path(resume)
    for folder in checkpoints(output_dir):
        try:
            verify(folder)
            return folder
        except CheckpointError as reason:
            say(f"passed over: {reason}")
    say(f"--resume auto: no whole checkpoint in {output_dir}, starting anew")
    return None


# -- state ---------------------------------------------------------------------------------------------------------


def training_tensors(parameters, optimizer, keep=True):
    """{name: tensor on the CPU} of weights and moments.  Of sharded ones all ranks have to ask, and one keeps them."""
    tensors = {}
    for index, parameter in enumerate(parameters):
        moments = {f"optimizer.{index}.{name}": value for name, value in optimizer.state[parameter].items()}
        for name, value in ({f"parameter.{index}": parameter.detach()} | moments).items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                tensors[name] = value.contiguous().cpu()
    return tensors


def save_state(folder, tensors, state):
    """Write named `tensors`, which are on the CPU, and `state`, which is JSON."""
    save_file(tensors, folder / "training.safetensors")
    (folder / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")


def save(args, world, parameters, optimizer, scheduler, scaler, tensors, state, say, add_files=None):
    """checkpoint-STEP in the output folder, add_files(folder) included; a full disk costs a line and not the run.

    tensors, state: what else there is, {name: tensor on the CPU} and JSON.  All ranks call it, rank 0 writes.
    """
    tensors = tensors | training_tensors(parameters, optimizer, keep=world.is_main)
    state = state | {"rates": [group["lr"] for group in optimizer.param_groups]}
    state |= {"scheduler": scheduler.state_dict(), "scaler": scaler.state_dict()}
    if world.is_main:
        try:
            with new_checkpoint(args.output_dir, state["step"], args.save_total_limit) as folder:
                save_state(folder, tensors, state)
                if add_files:
                    add_files(folder)
            say(f"checkpoint: {args.output_dir}/checkpoint-{state['step']}")
        except (OSError, SafetensorError) as error:
            say(f"checkpoint-{state['step']} could not be written ({error}): older ones stay, training goes on")
    if world.size > 1:
        dist.barrier()  # a rank that ended now, where the run was asked to, would have its launcher end the others


def check_identity(folder, identity):
    """Raise CheckpointError, naming the first difference, unless state["identity"] was this very dict."""
    saved = _read_state(folder)["identity"]
    for name in identity | saved:
        there, here = saved.get(name), identity.get(name)
        if name not in saved:
            raise CheckpointError(f"{folder} is of another version of the script, which has no {name}: start anew")
        if here != there:
            raise CheckpointError(
                f"{folder} is of another run: {name} was {there} and is {here}; start it the same way"
            )


def begun_in(folder):
    """The number type of a checkpoint's run, as str(dtype), which `--dtype auto` takes; None without a checkpoint."""
    return folder and _read_state(folder)["identity"].get("dtype")


def _read_state(folder):
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def load_state(folder, parameters, optimizer):
    """Restore weights, moments and learning rates of a verified checkpoint; returns (the further tensors, state)."""
    state, tensors = _read_state(folder), load_file(folder / "training.safetensors")
    moments = {}
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        _, index, moment = name.split(".")
        moments.setdefault(int(index), {})[moment] = _as(parameters[int(index)], tensors.pop(name))
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.copy_(_as(parameter, tensors.pop(f"parameter.{index}")))
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, rate in zip(optimizer.param_groups, state["rates"], strict=True):
        group["lr"] = rate
    return tensors, state


def _as(parameter, tensor):
    """A tensor of a file, split over the ranks as the parameter is, if it is (a count of steps is not).

    Its shards go where the parameter's are: with --optimizer-offload to the CPU, as the GPU may have no room.  Trap:
    distribute_tensor would put them, and for a moment all of the tensor, on the GPU.
    """
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    split = torch.empty_like(parameter.detach())
    rank, chunks = parameter.device_mesh.get_local_rank(), tensor.chunk(parameter.device_mesh.size())  # as FSDP2 cuts
    if rank < len(chunks):
        split.to_local().copy_(chunks[rank])
    return split


def restore(folder, parameters, optimizer, scheduler, scaler, world):
    """load_state, and the schedule, the scaler and this rank's RNG state; returns (further tensors, state).

    Another number of ranks than saved it, or another kind of device, draws dropout anew and says so.
    """
    tensors, state = load_state(folder, parameters, optimizer)
    scheduler.load_state_dict(state["scheduler"])
    scaler.load_state_dict(state["scaler"])
    ranks, size = tensors["rng_state"].shape
    if ranks == world.size and size == len(rng_state(world.device)):
        set_rng_state(tensors["rng_state"][world.rank], world.device)
    else:
        torch.manual_seed(torch.initial_seed() + state["step"])  # the initial seed has the rank in it
        distributed.print0(
            world, "dropout is drawn anew: the checkpoint is of another number of ranks or another kind of device"
        )
    return tensors, state


def own_sums(rows, world):
    """This rank's sums of those of all ranks (ranks, ...); if there were more or fewer of them, rank 0 has all."""
    if len(rows) == world.size:
        return rows[world.rank].to(world.device)
    return rows.sum(0).to(world.device) * world.is_main


def rng_state(world_device):
    """The state of torch's generators of this process, (bytes,) uint8: of the CPU, then of the device."""
    states = [torch.get_rng_state()]
    if world_device.type == "cuda":
        states.append(torch.cuda.get_rng_state(world_device))
    return torch.cat(states)


def set_rng_state(state, world_device):
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())  # it reads from the start of the storage, whatever the offset
    if world_device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), world_device)


# -- an end that was asked for -------------------------------------------------------------------------------------


class Termination:
    """Ctrl-C (SIGINT), SIGTERM or a closed terminal (SIGHUP) asks the run to save and end: `asked` turns into the
    signal's number, which the loops look at after each update and each pass of a frozen model.  A Ctrl-C after that
    ends at once, by KeyboardInterrupt.

    endings.run puts the handlers back.
    """

    def __init__(self):
        self.asked = 0
        for number in endings.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a script's `&` have it
                signal.signal(number, self._ask)

    def _ask(self, number, _):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and os.environ.get("LOCAL_RANK", "0") == "0":  # not by print: it may be what was broken into
            line = f"{signal.Signals(number).name}: saves and ends in a moment; Ctrl-C from here on ends at once\n"
            with suppress(OSError):  # the terminal is closed
                os.write(2, line.encode())
        self.asked = self.asked or number

    def end(self, number, sentence, say):
        """End this rank, as all of them do, because signal `number` asked: exit code 129, 130 or 143."""
        say(f"{signal.Signals(number).name}: {sentence}")
        distributed.stop()
        sys.exit(128 + number)

    def end_training(self, number, args, step, say):
        """`end` after update `step`, whose checkpoint was to be written."""
        folder = Path(args.output_dir) / f"checkpoint-{step}"
        what = f"{folder} is written" if folder.exists() else f"{folder} could not be written"
        self.end(number, f"ended after step {step}, {what}: the same command with --resume auto goes on", say)
