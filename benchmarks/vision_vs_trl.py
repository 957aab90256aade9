"""Compare dpo_hf_run.py with TRL's DPOTrainer on pairs with pictures: one model with random weights, the same LoRA.

    llava      SmolLM2-135M's text, CLIP-B/16's tower at 256 pixels: 256 tokens a picture
    idefics3   the same text, SigLIP-B/16's tower at 512 pixels: 64 tokens a picture

Each pair has a picture of its own.  `ours` keeps what the tower makes, as it does by itself: the pass that asks the
reference has made it.  `ours, nothing kept` runs the tower in each pass.  TRL, without gradient checkpointing and with
it (its default), runs the tower for both responses in policy and reference: it keeps no log-probs for pictures.

    bash setup.sh bench
    .venv/bin/python benchmarks/vision_vs_trl.py --kind llava --pairs 6

Each contender is a process of its own.  A time is from the end of one optimiser step to the end of the next.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook

import dpo_hf_run
import toy_vision
import toy_world
import vision
from formats.model_files import load_model
from harness import endings, flags
from lora import select_targets

TEXT = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, vocab_size=49_152)
TEXT |= dict(num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, model_type="llama")
TOWER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16)
WORDS = "a picture of some coloured things that stand beside each other on a table in front of a wall"
CONTENDERS = "ours", "ours, nothing kept", "trl", "trl-defaults"


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, natural = parser.add_argument, flags.number(int, least=1)
    add("--kind", choices=("llava", "idefics3"), default="llava", help="the model")
    add(
        "--pairs",
        type=flags.number(int, least=2),
        default=6,
        metavar="N",
        help="updates of one pair; the first is not timed",
    )
    add("--rounds", type=natural, default=1, metavar="N", help="run the contenders N times in turn: machines are noisy")
    add("--json", metavar="FILE", help="write everything to this file")
    add("--contender", help=argparse.SUPPRESS)
    add("--work", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# -- what all have -----------------------------------------------------------------------------------------------------


def write_world(kind, pairs, work):
    """A model with its processor, pictures and pairs."""
    tokenizer = toy_world.train_tokenizer([WORDS], toy_vision.CHAT_TEMPLATE, image_token="<image>")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    parts = dict(text_config=TEXT | ends, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    if kind == "llava":
        parts |= dict(vision_config=TOWER | dict(image_size=256, model_type="clip_vision_model"), image_seq_length=256)
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**parts))
        sizes = dict(size={"shortest_edge": 256}, crop_size={"height": 256, "width": 256})
        counted = dict(patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1)
        counted |= dict(image_token="<image>", chat_template=toy_vision.CHAT_TEMPLATE)
        processor = transformers.LlavaProcessor(transformers.CLIPImageProcessor(**sizes), tokenizer, **counted)
    else:
        tokenizer.add_tokens(["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"], special_tokens=True)
        parts |= dict(vision_config=TOWER | dict(image_size=512), scale_factor=4)
        model = transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(**parts))
        sizes = dict(size={"longest_edge": 512}, max_image_size={"longest_edge": 512}, do_image_splitting=False)
        images = transformers.Idefics3ImageProcessor(**sizes)
        counted = dict(image_seq_len=64, chat_template=toy_vision.CHAT_TEMPLATE)
        processor = transformers.Idefics3Processor(images, tokenizer, **counted)
    model.save_pretrained(work / "model")
    processor.save_pretrained(work / "model")
    from PIL import Image

    draw, rows = torch.Generator().manual_seed(0), []
    for number in range(pairs):
        pixels = torch.randint(256, (384, 512, 3), generator=draw, dtype=torch.uint8)
        Image.frombytes("RGB", (512, 384), pixels.numpy().tobytes()).save(work / f"{number}.png")
        said = {"chosen": f"{WORDS} {number}", "rejected": f"{number} {WORDS}"}
        rows.append({"image": f"{number}.png", "prompt": "what is there?"} | said)
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_ours(args, work, out):
    if "nothing" in args.contender:
        vision.KEPT_BYTES = 0
    words = ["--model", work / "model", "--dataset", work / "pairs.jsonl", "--eval-samples", 0, "--batch-size", 1]
    words += ["--gradient-accumulation-steps", 1, "--learning-rate", 1e-4, "--report-to", "none", "--output-dir", out]
    words += ["--logging-steps", 100, "--gradient-checkpointing", "off"]
    words += [] if torch.cuda.is_available() else ["--dtype", "fp32"]
    dpo_hf_run.main(dpo_hf_run.get_args(list(map(str, words))))


def run_trl(args, work, out):
    import peft
    import trl
    from datasets import Dataset
    from PIL import Image

    on_gpu, by_default = torch.cuda.is_available(), args.contender == "trl-defaults"
    rows = [json.loads(line) for line in (work / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        parts = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
        row["images"], row["prompt"] = [Image.open(work / row.pop("image"))], [{"role": "user", "content": parts}]
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": [{"type": "text", "text": row[side]}]}]
    model = load_model(work / "model", torch.bfloat16 if on_gpu else torch.float32, "cuda" if on_gpu else "cpu")
    adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules=select_targets(model))
    config = dict(per_device_train_batch_size=1, gradient_accumulation_steps=1, max_length=None, num_train_epochs=1)
    config |= dict(save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not on_gpu, bf16=on_gpu)
    config |= {} if by_default else dict(gradient_checkpointing=False)
    settings = trl.DPOConfig(output_dir=str(out), **config)
    processor = transformers.AutoProcessor.from_pretrained(work / "model")
    trl.DPOTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=processor, peft_config=adapter
    ).train()


def run_contender(args):
    """Print what this process has measured as JSON."""
    work, began, ends = Path(args.work), time.perf_counter(), []

    def note(*_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    register_optimizer_step_post_hook(note)
    with tempfile.TemporaryDirectory() as out:
        (run_trl if args.contender.startswith("trl") else run_ours)(args, work, Path(out) / "run")
    times = [after - before for before, after in zip(ends, ends[1:])]
    highest = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else highest
    print("\n" + json.dumps({"times": times, "before": ends[0] - began - median(times), "memory": memory}), flush=True)


def main(args):
    if args.contender:
        return run_contender(args)
    runs = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as work:
        write_world(args.kind, args.pairs, Path(work))
        for _ in range(args.rounds):
            for name, done in runs.items():
                words = [sys.executable, __file__, *sys.argv[1:], "--contender", name, "--work", work]
                ended = subprocess.run(words, capture_output=True, text=True)
                if ended.returncode:
                    sys.exit(f"{ended.stderr}\n{name} ended with exit code {ended.returncode}")
                done.append(json.loads(ended.stdout.strip().splitlines()[-1]))
                print(f"{name}: {median(done[-1]['times']):.2f} s a pair", flush=True)
    seconds = {name: median(second for run in done for second in run["times"]) for name, done in runs.items()}
    memory = {name: max(run["memory"] for run in done) for name, done in runs.items()}
    print(f"\n{args.kind}, {args.pairs} pairs x {args.rounds}, torch {torch.__version__}\n")
    columns = ["", "s a pair", "x of trl", "x of trl-defaults", "peak memory GB", "s before the first update"]
    print(f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", sep="\n")
    for name, done in runs.items():
        ratios = " | ".join(f"{seconds[other] / seconds[name]:.2f}" for other in ("trl", "trl-defaults"))
        before = median(run["before"] for run in done)
        print(f"| {name} | {seconds[name]:.2f} | {ratios} | {memory[name] / 1e9:.2f} | {before:.1f} |")
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    endings.run(partial(main), get_args())
