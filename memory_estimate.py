"""What a run will take in memory on each device, from the model's config alone: no weights are read, nothing is run.

Weights, gradients and optimiser are counted.  What a pass keeps for backward is counted too: the model without its
weights (meta device) runs one pass of the run's largest size, and every tensor that autograd saves is added up, each
storage once.  Attention stands there for what a fused kernel keeps: query, key, value, output and one number per row.

Legend: T tokens of a pass, N response tokens of a pass, V vocabulary.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

GB = 1e9
DEVICES = 24, 40, 64, 80, 141  # GB that cards have
CUDA = 0.8e9  # what CUDA's context and the libraries' workspaces take, about
WIDE = 4  # bytes of fp32


class FusedAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves, and computes nothing: for tensors without data."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad):
        return (None,) * 3


def _attend(module, query, key, value, attention_mask, **kwargs):
    return FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("counted", _attend)
AttentionMaskInterface.register("counted", sdpa_mask)


def saved_bytes(model, num_tokens):
    """Bytes that a pass of T tokens through the backbone of a model on the meta device keeps for backward."""
    storages, own = {}, {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor  # held, so that no other gets its number
        return tensor

    before = model.config._attn_implementation
    model.set_attn_implementation("counted")
    place = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            inputs = {"input_ids": place, "position_ids": place, "attention_mask": place.new_ones(1, 1, 1, 1)}
            states = model.base_model(**inputs, use_cache=False).last_hidden_state
    finally:
        model.set_attn_implementation(before)
    del states
    return sum(t.untyped_storage().nbytes() for number, t in storages.items() if number not in own)
