"""Weights split over the ranks, with torch's FSDP2: for runs that train all of them (--lora-r 0) on several devices."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_targets import text_decoder

METHODS = "packed_logps", "packed_scores", "response_states"  # of packed_model.py: what goes through a whole model


def shard(model, reference, world, dtype, say, offload=False):
    """Split the weights of a model on the CPU over the ranks' devices (FSDP2), and with them gradients and optimiser
    state; the reference's too, if it is another.  Returns the model's parameters.

    A block is put together while it computes, in `dtype`, and what is outside of the blocks around METHODS; what a rank
    keeps is fp32.  All ranks have to go through the models in step.  offload: what a rank keeps is on the CPU.  A model
    that does not take packed pairs is not split: how often it runs depends on the number of sequences.
    """
    settings = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy(),
    }
    for each in dict.fromkeys((model, reference)):
        if not each.packs_pairs:
            each.to(world.device)
            say(f"Not sharded, as sequences are scored one by one: each of {world.size} ranks has all of the weights")
            continue
        # Not a tower's: it does not run in every pass of every rank.  It comes with what is in no block.
        for block in [part for part in text_decoder(each).modules() if isinstance(part, GradientCheckpointingLayer)]:
            fully_shard(block, **settings)
        # The head of a reference stays whole after a pass: its states are used with it, outside.  A model's must not,
        # as its weights change.
        fully_shard(each, **settings, reshard_after_forward=each is model)
        for module in sharded_modules(each):  # a sum and not a mean, as in all_reduce_gradients
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        for name in METHODS:
            if hasattr(each, name):
                register_fsdp_forward_method(each, name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if model.packs_pairs:
        mine, total = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
        say(f"Sharded over {world.size} ranks (FSDP2): rank 0 keeps {mine:,} of {total:,} weights")
    return parameters


def sharded_modules(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole_state(model, dtype, world):
    """{name: tensor} of a model that was trained whole, in `dtype` on the CPU of rank 0; {} on the other ranks.

    A tied weight is there once, as in the files of transformers.
    """
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    state = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # every rank has to ask
        if world.is_main:
            state[name] = tensor.cpu().to(dtype if tensor.is_floating_point() else tensor.dtype)
    return state
