"""What the tests share: the toy world, tiny random models of each architecture, random pairs, the script in process."""

import logging
import os
import random
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

import dpo_hf_run
import packed_model
import toy_world
from harness import flags
from packing import pack
from preference_data import Pair

transformers.utils.logging.set_verbosity_error()
logging.getLogger("transformers").setLevel(logging.ERROR)

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


def run_script(argv, script=dpo_hf_run):
    """A script in this process, as its last line does; a user error is SystemExit(2)."""
    flags.run(script.main, script.get_args([str(word) for word in argv]), *script.USER_ERRORS)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy world, built once (about 20 s)."""
    return toy_world.build(tmp_path_factory.mktemp("world") / "toy")


@pytest.fixture
def script_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpo_hf_run.py"])
