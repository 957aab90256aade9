"""Compare dpo_hf_run.py with TRL's DPOTrainer: one model, the same LoRA, the same token ids in every update.

trl-best has bf16 weights, no checkpointing, the reference's log-probs computed beforehand, as ours does by itself, and
the pairs of an update by length, which saves padding.

    bash setup.sh bench
    .venv/bin/python benchmarks/dpo_vs_trl.py --model Qwen/Qwen3-0.6B --dataset harmless-base-test.jsonl.gz --rounds 3
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import contenders
import torch
import trl_trainers

import distributed
import dpo_hf_run
import lora
from formats.model_files import load_model
from harness import endings
from preference_data import Pair


def words(args, plan, name):
    return ["--dataset", args.dataset, *(["--adapter", plan["adapter"]] if name.endswith("fp32") else [])]


def write_start(args, ours, folder):
    """An adapter whose B is random too: with B = 0 the gradient of A is zero, which proves little."""
    model = load_model(args.model, torch.float32, "cpu")
    distributed.seed_everything(ours.seed)
    for lora_b in lora.add_adapter(model, "start", ours.lora_r, ours.lora_alpha)[1::2]:
        torch.nn.init.normal_(lora_b, std=0.02)
    lora.save_adapter(model, "start", folder, args.model)


def run_trl(args, ours, plan, name):
    import peft

    config, model = dict(beta=ours.beta, learning_rate=ours.learning_rate, seed=ours.seed), args.model
    adapter = peft.LoraConfig(r=ours.lora_r, lora_alpha=ours.lora_alpha, target_modules="all-linear")
    if name != "trl-defaults":
        config |= dict(precompute_ref_log_probs=True)
    if name == "trl-fp32":  # TRL makes a frozen copy of a given adapter its reference, as ours does
        base, adapter = load_model(args.model, torch.float32, "cpu"), None
        model = peft.PeftModel.from_pretrained(base, plan["adapter"], is_trainable=True)
    row = lambda *ids: dict(zip(Pair._fields, ids))
    return trl_trainers.train("DPO", model, row, config, args, plan, name, peft_config=adapter)


BENCHMARK = contenders.Benchmark(
    file=__file__,
    script=dpo_hf_run,
    words=words,
    write_start=write_start,
    run_trl=run_trl,
    scores=False,
    before="imports, loading, the pass that keeps the reference's log-probs",
)

if __name__ == "__main__":
    args = contenders.get_args(BENCHMARK, __doc__, batch_size=2, accumulation=4)
    endings.run(partial(contenders.compare, BENCHMARK), args)
