"""Tiny models of kinds with a trait that packed pairs are asked about, and what is asked of torch's attention."""

import torch
import torch.nn.functional as F
import transformers
from tiny_models import SIZES
from torch import nn
from torch.overrides import TorchFunctionMode

MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MOE |= dict(shared_expert_intermediate_size=32)
KINDS = {  # name -> (config class, its arguments): of transformers' kinds, those with a trait that is asked for here
    "phimoe": (transformers.PhimoeConfig, SIZES | MOE | dict(sliding_window=12, router_jitter_noise=0.1)),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        SIZES | MOE | dict(use_sliding_window=True, sliding_window=12, max_window_layers=1),
    ),
    "doge": (transformers.DogeConfig, SIZES | dict(sliding_window=12)),
    "llama4": (
        transformers.Llama4TextConfig,
        SIZES
        | MOE
        | dict(head_dim=8, intermediate_size_mlp=64, attention_chunk_size=12, pad_token_id=None)
        | dict(layer_types=["chunked_attention", "full_attention"]),
    ),
    "falcon_h1": (
        transformers.FalconH1Config,
        SIZES | dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1),
    ),
    "seed_oss": (transformers.SeedOssConfig, SIZES | dict(residual_dropout=0.1)),
    "starcoder2": (transformers.Starcoder2Config, SIZES | dict(residual_dropout=0.1, embedding_dropout=0.1)),
    "falcon": (
        transformers.FalconConfig,
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.1),
    ),
    "bert": (
        transformers.BertConfig,
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    ),
    "gemma3 of both sides": (
        transformers.Gemma3TextConfig,
        SIZES | dict(head_dim=8, use_bidirectional_attention=True),
    ),
    "llama": (transformers.LlamaConfig, SIZES),
}


def build(name, dtype=torch.float32, std=0.2, **changes):
    config_class, arguments = KINDS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**arguments | changes))
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or "experts" in path:
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=std) if weight.ndim > 1 else None
    return model.to(dtype).eval()


class Calls(TorchFunctionMode):
    """What is asked of torch's attention."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.found.append((args[0].shape[1] == args[1].shape[1], "attn_mask" in kwargs))
        if function is torch.Tensor.contiguous and args[0].device.type == "cuda":
            return args[0]  # a build without CUDA has no guard for its devices
        return function(*args, **(kwargs or {}))
