"""Compare train_rm.py with TRL's RewardTrainer: one model, the same LoRA and a scalar head, the same token ids in
every update.

TRL is given our token ids, cut as ours are: of itself it leaves longer rows out.  Both read the score at the last
token: TRL gets a padding token that ends no response, as one that does would make it read one token early.  In the fp32
pair both begin with a head of zeros, as train_rm.py does; TRL of itself begins with a random one.  trl-best has bf16
weights, no checkpointing, the pairs of an update by length, which saves padding, and on a CPU eager attention, which is
faster there in bf16 than torch's own and takes more memory.

    bash setup.sh bench
    .venv/bin/python benchmarks/rm_vs_trl.py --model Qwen/Qwen3-0.6B --dataset helpful-base-test.jsonl.gz --rounds 3
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import contenders
import torch
import trl_trainers

import distributed
import lora
import train_rm
from formats.model_files import load_model, load_skeleton, load_tokenizer, pad_unlike_ends
from harness import endings


def words(args, plan, name):
    return ["--task", "helpful", "--train-helpful-path", args.dataset, "--lora-dropout", 0]


def write_start(args, ours, folder):
    """The adapter and the head that train_rm.py begins with."""
    model = load_model(args.model, torch.float32, "cpu", scores=True)
    distributed.seed_everything(ours.seed)
    lora.add_adapter(model, "start", ours.lora_r, ours.lora_alpha)
    lora.save_adapter(model, "start", folder, args.model, head=model.score.weight)


def run_trl(args, ours, plan, name):
    import peft

    model, tokenizer = args.model, load_tokenizer(args.model)
    pad = pad_unlike_ends(args.model, tokenizer, load_skeleton(args.model, tokenizer, args, scores=True).config)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    options = dict(task_type="SEQ_CLS", modules_to_save=["score"])  # as TRL's documentation has it for a base model
    adapter = peft.LoraConfig(r=ours.lora_r, lora_alpha=ours.lora_alpha, target_modules="all-linear", **options)
    if name == "trl-fp32":
        base, adapter = load_model(args.model, torch.float32, "cpu", scores=True), None
        model = peft.PeftModel.from_pretrained(base, plan["adapter"], is_trainable=True)
    config = dict(learning_rate=ours.learning_rate, seed=ours.seed)
    if name == "trl-best" and plan["dtype"] == "bf16" and not torch.cuda.is_available():
        config |= dict(model_init_kwargs={"attn_implementation": "eager"})
    row = lambda prompt, chosen, rejected: dict(chosen_ids=prompt + chosen, rejected_ids=prompt + rejected)
    others = dict(peft_config=adapter, processing_class=tokenizer)
    return trl_trainers.train("Reward", model, row, config, args, plan, name, **others)


BENCHMARK = contenders.Benchmark(
    file=__file__,
    script=train_rm,
    words=words,
    write_start=write_start,
    run_trl=run_trl,
    scores=True,
    before="imports, loading",
)

if __name__ == "__main__":
    args = contenders.get_args(BENCHMARK, __doc__, batch_size=4, accumulation=2)
    endings.run(partial(contenders.compare, BENCHMARK), args)
