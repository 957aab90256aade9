"""Every causal language model that transformers can build at tiny size, through `prepare_model` as the scripts call it;
writes the table of docs/models.md.

    python benchmarks/architectures.py                  # all of them, some minutes on one core
    python benchmarks/architectures.py qwen3 phimoe     # some of them, printed only

Each model has random weights, windows of 12 tokens, experts and state spaces where its kind has them, and dropout of
0.1 wherever its config knows a name for it.  Two pairs of some 130 tokens are scored.  The yardstick is an untouched
copy: transformers' own attention, one sequence at a time, full logits.
"""

import copy
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import lora
from formats.model_files import ModelError, not_causal
from packed_model import prepare_model
from packing import pack

PAGE = Path(__file__).resolve().parent.parent / "docs/models.md"
MARK = "<!-- what follows is written by benchmarks/architectures.py -->\n"
HEAD = "| `model_type` | path | off the yardstick | train mode | with an adapter | why |\n|---|---|---|---|---|---|\n"
SECONDS = 120  # for each model
LENGTHS = (60, 50, 40), (70, 20, 33)  # prompt, chosen, rejected
# fmt: off
SMALL = {  # what the families call the same few sizes
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "sliding_window": 12,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 12,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4,
}
SMALL |= {f"{name}dropout": 0.1 for name in ("", "attention_", "activation_", "hidden_", "residual_", "embedding_")}
SMALL |= dict.fromkeys(
    ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1
)
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
WINDOW_ABOVE = {"use_sliding_window": True, "max_window_layers": 1}
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14}
OWN = {  # what a kind needs beside or instead; None: not to be given; "text_config": it is around a model for pictures
    **dict.fromkeys("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa".split()
                    + ["minicpm3", "youtu"], {"head_dim": None, "num_key_value_heads": 4}),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), MIXED),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), WINDOW_ABOVE),
    **dict.fromkeys(("gptj", "codegen"), {"rotary_dim": 4}),
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "diffllama": {"attention_dropout": None},
    "emu3": {"text_config": {}, "vq_config": {"base_channels": 32, "num_res_blocks": 1, "embed_dim": 4,
                                              "z_channels": 4, "codebook_size": 16, "double_latent": False}},
    "falcon": {"head_dim": None, "num_kv_heads": 4},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3": {"text_config": {}, "vision_config": EYES, "mm_tokens_per_image": 4},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 12,
                "num_hidden_layers": None},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config": {"attention_chunk_size": 12, "intermediate_size_mlp": 64,
                               "layer_types": ["chunked_attention", "full_attention"]},
               "vision_config": EYES | {"vision_output_dim": 32}},
    "llama4_text": {"attention_chunk_size": 12, "intermediate_size_mlp": 64,
                    "layer_types": ["chunked_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    "phimoe": {"router_jitter_noise": 0.1},
    "qwen3_5": {"text_config": MIXED, "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64,
                                                        "num_heads": 2, "out_hidden_size": 32}},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlm": {"causal": True},
    "xlstm": {"head_dim": None, "v_head_dim": None, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA | {"n_mamba_heads": 2},
    "zamba2": ZAMBA | MAMBA,
    "zaya": {"num_experts_per_tok": 1},
}
# fmt: on


def tiny_model(kind):
    """A model of a kind in eval mode, with random weights so wide that logits differ clearly.  Raises ModelError."""
    own = OWN.get(kind, {})
    sizes = {name: value for name, value in (SMALL | own).items() if value is not None}
    if "text_config" in own:
        sizes = own | {"text_config": SMALL | own["text_config"]}
    config = AutoConfig.for_model(kind, **sizes)
    if config.is_encoder_decoder:
        raise not_causal(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > 50e6:
        raise ValueError(f"{size:,} weights are not tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or "experts" in path:
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=0.2) if weight.ndim > 1 else None
    return model


def yardstick(model, pairs):
    """(2, B) log-probs by an untouched model, one sequence at a time."""
    sums = []
    for side in (1, 2):
        for pair in pairs:
            ids = torch.tensor([pair[0] + pair[side]])
            table = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            sums.append(sum(table[place - 1, ids[0, place]] for place in range(len(pair[0]), ids.shape[1])))
    return torch.stack(sums).view(2, -1)


def apart(found, expected):
    return f"{((found - expected).abs().max() / expected.abs().max()).item():.0e}".replace("0e+00", "0")


@torch.no_grad()
def cells(kind):
    """A model's row of the table: path, how far its log-probs are off, what train mode and an adapter change, why."""
    try:
        model = tiny_model(kind)
        untouched, adapted = copy.deepcopy(model), copy.deepcopy(model)
        said = prepare_model(model)
    except ModelError as error:
        return "refused", "", "", "", str(error).partition(" is ")[2].partition(",")[0]
    draw = torch.Generator().manual_seed(0)
    pairs = [[torch.randint(3, 97, (n,), generator=draw).tolist() for n in sizes] for sizes in LENGTHS]
    batch, expected = pack(pairs), yardstick(untouched, pairs)
    scored = torch.stack(model.packed_logps(batch))
    trained = torch.stack(model.train().packed_logps(batch))
    try:
        lora.add_adapter(adapted, "policy", 4, 8)
        prepare_model(adapted)
        adapter = apart(torch.stack(adapted.packed_logps(batch)), scored)
        with torch.enable_grad():
            sum(adapted.train().packed_logps(batch)).sum().backward()
    except (lora.AdapterError, ModelError) as error:
        adapter = f"refused: {error}"
    except Exception as error:  # of a layer that cannot carry one
        adapter = f"{type(error).__name__}: {str(error)[:100]}"
    path = "packed" if model.packs_pairs else "plain"
    why = said.replace("packed pairs: on, chosen and rejected share one pass over their prompt", "").removeprefix("; ")
    why = why.removeprefix("packed pairs: off, sequences are scored one by one ")
    why = why[1:].replace(")", "", 1) if why.startswith("(") else why
    return path, apart(scored, expected), apart(trained, scored), adapter, why


def late(*_):
    raise TimeoutError(f"more than {SECONDS} seconds")


def main(kinds):
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, late)
    rows, failed = [], []
    for kind in kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        signal.alarm(SECONDS)
        try:
            rows.append(f"| {kind} | {' | '.join(cells(kind))} |\n")
            print(rows[-1], end="", flush=True)
        except Exception as error:  # a size that its config does not take, a library that is not there
            failed.append(kind)
            print(f"{kind} was not built: {type(error).__name__}: {str(error).strip()[:300]!r}", flush=True)
        signal.alarm(0)
    if kinds:
        return
    counts = {path: sum(row.split(" | ")[1] == path for row in rows) for path in ("packed", "plain", "refused")}
    said = ", ".join(f"{count} {path}" for path, count in counts.items())
    text = f"transformers {transformers.__version__}, {len(rows)} kinds: {said}.\n\n{HEAD}{''.join(rows)}\n"
    text += f"Not built at this size, and so not tried ({len(failed)}): {', '.join(failed)}.\n"
    PAGE.write_text(PAGE.read_text("utf-8").partition(MARK)[0] + MARK + "\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
