"""Tiny models with random weights of each architecture, random pairs, and the same numbers one sequence at a time."""

import random
from argparse import Namespace

import pytest
import torch
import transformers
from torch import nn

import lora
import packed_model
from packing import pack
from preference_data import Pair

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
)


GPT = dict(vocab_size=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
CONFIGS = {  # name -> (config class, its arguments); a sliding window of 4 is shorter than most prompts below
    "qwen3": (transformers.Qwen3Config, SIZES | dict(head_dim=8, tie_word_embeddings=True)),
    "qwen2": (transformers.Qwen2Config, SIZES),
    "llama": (transformers.LlamaConfig, SIZES),
    "mistral": (transformers.MistralConfig, SIZES | dict(sliding_window=4)),
    "gemma3": (
        transformers.Gemma3TextConfig,
        SIZES
        | dict(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
        | dict(final_logit_softcapping=30.0),
    ),
    "gpt2": (transformers.GPT2Config, GPT | dict(n_embd=32, n_positions=128)),
    "gemma2": (transformers.Gemma2Config, SIZES | dict(head_dim=8, sliding_window=4)),
    "bloom": (transformers.BloomConfig, GPT | dict(hidden_size=32)),
}


def tiny_model(name, dtype=torch.float32, seed=0, **changes):
    """A tiny model with random weights, in eval mode; weights are wide enough for logits to differ clearly."""
    config_class, arguments = CONFIGS[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**arguments | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval()


def random_adapter(model, r=3, alpha=6):
    """Add an adapter whose A and B are both random; its parameters, in the type of LoRA's, fp32."""
    torch.manual_seed(1)
    parameters = lora.add_adapter(model, "policy", r, alpha)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.2)
    return parameters


def random_pairs(shapes, seed=0, vocab=64):
    """Pairs of random tokens with the given (prompt, chosen, rejected) lengths; responses end in token 1."""
    draw = random.Random(seed)

    def ids(length):
        return [draw.randrange(2, vocab) for _ in range(length)]

    return [Pair(ids(p), ids(c - 1) + [1], ids(r - 1) + [1]) for p, c, r in shapes]


def random_batch(shapes, seed=0):
    return pack(random_pairs(shapes, seed))


def plain_logps(model, batch):
    """packed_logps by the plain path, whatever the model can do."""
    return packed_model.logps_of(batch, *packed_model.plain_states(model, batch))


PACKING = ["qwen3", "qwen2", "llama", "mistral", "gemma3", "gpt2"]
SHAPES = [(5, 4, 3), (1, 3, 1), (9, 1, 6), (1, 1, 1), (12, 7, 8)]  # (prompt, chosen, rejected) lengths
ON = "packed pairs: on, chosen and rejected share one pass over their prompt"
OTHERS = {  # architectures that only the choice of path is tested on
    "cohere": (transformers.CohereConfig, SIZES),
    "lfm2": (
        transformers.Lfm2Config,
        SIZES | dict(num_hidden_layers=3, layer_types=["conv", "conv", "full_attention"]),
    ),
    "opt": (
        transformers.OPTConfig,
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4)
        | dict(max_position_embeddings=128, word_embed_proj_dim=32),
    ),
}


class WideNorm(nn.Module):
    """RMSNorm in the type of its input.

    transformers takes it in fp32 even in a double model.  Two orders of summation then differ by 1e-7 where an fp32
    rounding falls the other way, and gradients always do: nothing smaller than that could be seen.
    """

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self.offset = float(type(norm).__name__.startswith("Gemma"))  # Gemma's weight is the distance from 1

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def model_of(name, dtype, **changes):
    config_class, arguments = CONFIGS.get(name) or OTHERS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, name, (config_class, arguments | changes))
        return tiny_model(name, dtype)


def double_model(name, **changes):
    model = model_of(name, torch.float64, **changes)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, WideNorm(module))
    return model


def oracle(model, pairs, attention="sdpa"):
    """(2, B) log-probs, chosen then rejected: one sequence at a time, full logits, log_softmax, transformers' sdpa."""
    assert model.config._attn_implementation == attention  # not eager: it takes its softmax in fp32
    sums = []
    for side in (1, 2):
        for pair in pairs:
            ids = torch.tensor([pair[0] + pair[side]])
            table = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            sums.append(sum(table[i - 1, ids[0, i]] for i in range(len(pair[0]), ids.shape[1])))
    return torch.stack(sums).view(2, -1)


def scores(model, pairs):
    return torch.stack(model.packed_logps(pack(pairs)))


def assert_same(got, expected, tolerance=1e-12):
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def randomize(parameters, seed=7, spread=0.2):
    """A and B both away from zero: with B = 0 a wrong scale, a wrong A and a missing dropout all look right."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(spread * torch.randn(parameter.shape, generator=draw))
    return parameters


MISTRAL = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def argmax_one_by_one(model, prompt, num_tokens, ends=(1,)):
    """The likeliest token each time, from whole forward passes without cache, padding or `generate`."""
    response = []
    while len(response) < num_tokens and not (response and response[-1] in ends):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, -1]
        response.append(logits.argmax().item())
    return response


def logps_of_one(model, prompt, response, vectors=None, logits=False):
    """log p(response | prompt) by one forward of transformers, or the log-probs of all tokens at response positions."""
    embed = model.get_input_embeddings()
    states = embed(torch.tensor(prompt + response))[None]
    states = states if vectors is None else torch.cat((vectors[None].to(states), states), 1)
    start = states.shape[1] - len(response) - 1
    table = model(inputs_embeds=states, use_cache=False).logits[0, start:-1].log_softmax(-1)
    return table if logits else table.gather(1, torch.tensor(response)[:, None]).sum()


def skeleton_of(model):
    """The model without its weights."""
    with torch.device("meta"):
        return type(model)(model.config)


def flags(**changes):
    """What --estimate-memory goes by."""
    plain = dict(dtype="bf16", lora_r=16, lora_dropout=0.0, batch_size=4, gradient_accumulation_steps=2)
    plain |= dict(max_length=512, max_prompt_length=256, tokens_per_microbatch=0, gradient_checkpointing="off")
    return Namespace(**plain | changes)
