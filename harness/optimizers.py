"""AdamW in three forms that differ in where its two moments live and how wide they are.

Bytes of each rank for each trained fp32 number, beside the 4 of the weight and the 4 of its gradient:

                                  on the device      in the CPU's memory
    --optimizer adamw                       8                      0
    --optimizer adamw8bit                2.03                      0      tensors under 4,096 numbers: 8
    --optimizer-offload                     0                     16      8 of moments, 8 to pass numbers through

Each is a torch.optim.Optimizer whose `state` is keyed by the parameters and holds tensors alone, so that schedules,
GradScaler and checkpoints treat all three alike.
"""

import logging
import math

import torch
from transformers.optimization import get_scheduler

from formats.user_errors import UserError

WIDE = 4  # bytes of fp32


class OptimizerError(UserError):
    """An optimiser that cannot step here, in one sentence for the user."""


def check(args, device_type, sharded=False):
    """Raise OptimizerError, before any model loads, if the optimiser of the flags cannot step on cpu, cuda or mps.

    sharded: the parameters will be DTensors of fully_shard.
    """
    if args.optimizer == "adamw":
        return
    if args.optimizer_offload:
        raise OptimizerError(
            "--optimizer-offload does not go with --optimizer adamw8bit, whose moments are small and stay on the "
            "device: leave one of the two out"
        )
    if sharded:
        raise OptimizerError(
            "--optimizer adamw8bit cannot step on weights that are sharded over ranks: use --optimizer adamw"
        )
    try:
        bitsandbytes = _import_bitsandbytes()
    except ImportError as error:
        raise OptimizerError(
            f"--optimizer adamw8bit needs bitsandbytes ({error}): pip install bitsandbytes, or --optimizer adamw"
        ) from None
    try:  # one step, as what a release can do on which device is written nowhere: 0.50 lacks mps, older ones cpu
        probe = torch.nn.Parameter(torch.ones(4096, device=device_type))
        probe.grad = torch.ones_like(probe)
        bitsandbytes.optim.AdamW8bit([probe]).step()
    except Exception as error:  # a kernel or a library that is not there shows in a different error on each device
        reason = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".:")  # torch's go on for a page
        raise OptimizerError(
            f"--optimizer adamw8bit: bitsandbytes {bitsandbytes.__version__} cannot step on {device_type} ({reason}): "
            "use --optimizer adamw"
        ) from None


def check_dtype(args, dtype, sharded):
    """Raise OptimizerError for fp16 gradients that are shards in the CPU's memory; dtype: what is computed in.

    GradScaler copies its scale to them without waiting: they may be divided by what is not there yet.
    """
    if sharded and args.optimizer_offload and dtype == torch.float16:
        raise OptimizerError(
            "--optimizer-offload does not go with fp16 where weights are sharded over ranks: use --dtype bf16 or fp32, "
            "or leave it out"
        )


def moments_bytes(sizes, optimizer):
    """Bytes of AdamW's two moments of tensors of these sizes.

    adamw8bit (bitsandbytes): a byte for each number and 4 for the largest of each 256; fp32 in tensors below 4,096.
    """
    of_one_moment = 0
    for size in sizes:
        is_narrow = optimizer == "adamw8bit" and size >= 4096
        of_one_moment += size + WIDE * math.ceil(size / 256) if is_narrow else WIDE * size
    return 2 * of_one_moment


def make_optimizer(parameters, args):
    """The optimiser that args.optimizer and args.optimizer_offload name, over a list of parameters.

    args: also learning_rate and weight_decay.  --optimizer-offload leaves DTensors alone: fully_shard's
    CPUOffloadPolicy keeps them, their gradients and so their moments in the CPU's memory already.
    """
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw8bit":
        return _adamw8bit(parameters, settings)
    optimizer = torch.optim.AdamW(parameters, **settings, fused=True)  # one pass over the numbers, no temporaries
    if args.optimizer_offload:
        from torch.distributed.tensor import DTensor  # half a second

        if not isinstance(parameters[0], DTensor):
            _offload(optimizer, parameters)
    return optimizer


def make_scheduler(optimizer, args, num_updates, say):
    """The schedule over num_updates that args.lr_scheduler and args.warmup_steps name; say: prints a line."""
    name = "constant_with_warmup" if args.lr_scheduler == "constant" else args.lr_scheduler  # "constant" has no warm-up
    if args.warmup_steps > num_updates:
        reached = args.learning_rate * num_updates / args.warmup_steps
        say(
            f"--warmup-steps {args.warmup_steps} is longer than the run of {num_updates} updates: its rate ends at "
            f"{reached:.2g}, not {args.learning_rate:g}"
        )
    return get_scheduler(name, optimizer, args.warmup_steps, num_updates)


# -- moments in the CPU's memory -------------------------------------------------------------------------------------


def _offload(optimizer, parameters):
    """Let AdamW step in the CPU's memory: during a step its parameters are copies there, and so are the moments.

    parameter.data and .grad are exchanged, not the parameter, so `optimizer.state` keeps its keys.  A step costs three
    copies over the bus (weights and gradients there, weights back); the moments, twice as large, never move.
    """
    # Pinned memory is copied faster; torch rounds each piece of it up to a power of two bytes.
    copies = {
        parameter: [torch.empty(parameter.shape, pin_memory=parameter.is_cuda) for _ in range(2)]
        for parameter in parameters
    }
    on_device = {}  # parameter -> its own (weight, gradient), while it is exchanged
    on_gpu = parameters[0].is_cuda

    def exchange(parameter):
        on_device[parameter] = parameter.data, parameter.grad
        parameter.grad = None  # a gradient has to be where its parameter is
        parameter.data = copies[parameter][0]

    def before_step(*_):
        for parameter in parameters:
            if parameter.grad is not None:
                exchange(parameter)
                for copy, own in zip(copies[parameter], on_device[parameter], strict=True):
                    # The weight each time: what was written into it since the last step counts.
                    copy.copy_(own, non_blocking=True)
                parameter.grad = copies[parameter][1]
        if on_gpu:  # wait once, for all copies
            torch.cuda.synchronize()

    def put_back(parameter):
        parameter.grad = None
        parameter.data, parameter.grad = on_device.pop(parameter)

    def after_step(*_):
        for parameter in list(on_device):
            own_weight, _ = on_device[parameter]
            own_weight.copy_(parameter.data, non_blocking=True)
            put_back(parameter)

    def before_load(*_):
        """load_state_dict moves the moments to where the parameters are: for so long they are in the CPU's memory."""
        for parameter in parameters:
            exchange(parameter)

    def after_load(*_):
        for parameter in parameters:
            put_back(parameter)

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    optimizer.register_load_state_dict_pre_hook(before_load)
    optimizer.register_load_state_dict_post_hook(after_load)
    # A fused AdamW looks by itself, on the device, whether gradients are finite, so that GradScaler calls it for each
    # update.  This one is on another device: GradScaler shall look, and not call it.
    optimizer._step_supports_amp_scaling = False


# -- moments of 8 bits -----------------------------------------------------------------------------------------------


def _import_bitsandbytes():
    logger = logging.getLogger("bitsandbytes")
    logger.setLevel(logging.ERROR)  # or it asks, on a CPU, for a package that speeds up 4-bit products
    import bitsandbytes

    return bitsandbytes


def _adamw8bit(parameters, settings):
    """bitsandbytes' AdamW: moments are uint8 indices into a table of 256 values, times one fp32 per 256 numbers.

    Its state holds the count of steps as an int and the two tables with each parameter.  Between steps here the count
    is a tensor, and the tables are left out, as a checkpoint holds each tensor once.
    """
    optimizer = _import_bitsandbytes().optim.AdamW8bit(parameters, **settings)
    tables = {name: table.to(parameters[0].device) for name, table in optimizer.name2qmap.items()}
    optimizer.name2qmap = tables
    optimizer.non_castable_tensor_keys.add("step")  # bf16 parameters would make a bf16 of it when it is loaded

    def before_step(*_):
        for state in optimizer.state.values():
            if state:
                state["step"] = int(state["step"])
                if state["state1"].dtype == torch.uint8:
                    state |= {"qmap1": tables["dynamic"], "qmap2": tables["udynamic"]}

    def after_step(*_):
        for state in optimizer.state.values():
            if state:
                state["step"] = torch.tensor(state["step"])
                state.pop("qmap1", None)
                state.pop("qmap2", None)

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    return optimizer
