"""The flags that every training script has, with its documented defaults, and what no single one of them can see."""

from pathlib import Path

from formats import written_files
from formats.json_files import read_object
from harness import toys
from harness.flags import number


def add_common_flags(
    parser,
    epochs=1,
    batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=5e-6,
    lora_learning_rate=1e-4,
    lora_dropout=0.0,
    max_length=512,
    max_prompt_length=256,
    held_out="pairs held out; 0: none (default: 10 %%, at most 100)",
    output_dir="outputs",
    adapter=True,
):
    """Add them behind the script's own.  learning_rate: for all weights; adapter: flags of LoRA, and its rate, too."""
    count, natural = number(int, least=0), number(int, least=1)
    rate, positive, share = number(float, least=0), number(float, above=0), number(float, least=0, below=1)
    length, tokens = number(int, least=2, most=10**7), number(int, least=1, most=10**7)  # as of the longest contexts

    add = parser.group("model")
    add("--trust-remote-code", action="store_true", help="run model code that comes with the weights")

    add = parser.group("data")
    add("--num-samples", type=count, default=0, metavar="N", help="rows to read; 0: all")
    add("--eval-samples", type=count, metavar="N", help=held_out)
    add("--max-length", type=length, default=max_length, metavar="N", help="tokens of prompt + response")
    half = "half of --max-length"
    half = half if max_prompt_length == max_length // 2 else f"{max_prompt_length}; {half} where that is given"
    add("--max-prompt-length", type=tokens, metavar="N", help=f"tokens of the prompt (default: {half})")
    add("--chat-template-strings", action="store_true", help="put plain strings through the chat template")
    add("--skip-invalid", action="store_true", help="leave malformed rows out instead of stopping at the first")

    if adapter:
        add = parser.group("LoRA")
        rank = number(int, least=0, most=65_536)
        add("--lora-r", type=rank, default=16, metavar="R", help="rank; 0: train all weights")
        add("--lora-alpha", type=positive, default=32, metavar="A", help="the adapter is scaled by A / R")
        add("--lora-dropout", type=share, default=lora_dropout, metavar="P", help="on the adapter's input")
        what = "layers to adapt (default: all linears of the blocks)"
        add("--lora-target-modules", nargs="+", metavar="NAME", help=what)
        what = "also write a whole model, adapter merged, to OUTPUT_DIR/merged"
        add("--save-merged", action="store_true", help=what)

    add = parser.group("updates")
    names = "--epochs", "--num-epochs", "--num-train-epochs"
    add(*names, type=natural, default=epochs, metavar="N", help="passes over the data")
    add("--max-steps", type=count, default=0, metavar="N", help="updates at most; 0: all of the epochs")
    add("--batch-size", type=natural, default=batch_size, metavar="B", help="pairs per device and pass")
    accumulation = gradient_accumulation_steps
    add("--gradient-accumulation-steps", type=natural, default=accumulation, metavar="N", help="passes per update")
    what = "AdamW's rate at its highest"
    if adapter:
        rates = f"{lora_learning_rate:.0e} with LoRA, {learning_rate:.0e} for all weights".replace("e-0", "e-")
        what = f"{what} (default: {rates})"
    add("--learning-rate", type=positive, default=None if adapter else learning_rate, metavar="LR", help=what)
    add("--warmup-steps", type=count, default=0, metavar="N", help="updates over which the rate rises from 0")
    add("--lr-scheduler", choices=("linear", "cosine", "constant"), default="linear", help="how the rate falls")
    add("--weight-decay", type=rate, default=0.0, metavar="W", help="of AdamW")
    add("--max-grad-norm", type=rate, default=1.0, metavar="G", help="clip the gradient's norm; 0: no clipping")
    what = "of shuffle, split and LoRA's A" if adapter else "of shuffle, split and first vectors"
    add("--seed", type=number(int, least=0, below=2**63), default=42, metavar="N", help=what)

    add = parser.group("memory and device")
    what = "say what memory the run will take, from the model's config alone, and end"
    add("--estimate-memory", action="store_true", help=what)
    what = "slower, less memory; auto: where it is needed; alone it means on"
    add("--gradient-checkpointing", choices=("auto", "on", "off"), default="auto", help=what)
    what = "passes of at most T tokens instead of B pairs; an update has the same pairs (0: off; auto: as many"
    what += " as fit, the default without --batch-size)"
    count_or_auto = lambda text: text if text == "auto" else count(text)
    add("--tokens-per-microbatch", type=count_or_auto, metavar="T", help=what)
    add("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="adamw8bit: 8-bit moments (bitsandbytes)")
    add("--optimizer-offload", action="store_true", help="AdamW's moments in the CPU's memory: slower")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the base model's weights")
    what = "nf4: the frozen base in 4 bits (bitsandbytes); same: in --dtype"
    add("--base-dtype", choices=("same", "nf4"), default="same", help=what)
    add(
        "--tf32",
        action="store_true",
        help="products of --dtype fp32 in TF32 on a GPU: faster, with 10 bits instead of 23",
    )
    add("--compile", action="store_true", help="blocks through torch.compile: faster after a minute or more")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="where to train")
    what = "how long a rank waits for the others before it ends"
    add("--ddp-timeout", type=number(int, least=1, most=10**6), default=600, metavar="SECONDS", help=what)

    add = parser.group("output")
    add("--output-dir", default=output_dir, metavar="DIR", help="where the run goes")
    add("--overwrite", action="store_true", help="replace the run that the output folder holds")
    add("--resume", default="none", metavar="none|auto|DIR", help="go on from the newest whole checkpoint, or from DIR")
    add("--save-steps", type=count, default=0, metavar="N", help="updates between checkpoints; 0: none")
    add("--save-total-limit", type=count, default=0, metavar="N", help="checkpoints to keep, the newest; 0: all")
    add("--logging-steps", type=natural, default=10, metavar="N", help="updates between two log lines")
    add("--eval-steps", type=count, default=0, metavar="N", help="updates between evaluations; 0: first and last only")
    reporters = "auto", "tensorboard", "wandb", "swanlab", "none"
    what = f"some of {', '.join(reporters)}; auto: TensorBoard where it is installed"
    add("--report-to", nargs="+", choices=reporters, default="auto", metavar="TRACKER", help=what)
    add("--logging-dir", metavar="DIR", help="what --report-to writes (default: logs in the output folder)")
    what = "numbers of frozen models, kept for later runs (default: in the output folder)"
    add("--cache-dir", metavar="DIR", help=what)
    parser.rates = lora_learning_rate, learning_rate  # for `parse` below
    parser.max_prompt_length = max_prompt_length


def parse(parser, argv=None):
    """parser.parse_args, the defaults that follow from another flag, and refused what no single flag can see.

    A run that goes on takes the flags that nobody gives from its beginning; `args.as_begun` has those that it changes.
    """
    args = _filled(parser, argv)
    args.as_begun = {}
    if begun := _begun_with(args):
        parser.set_defaults(**begun)
        before, args = args, _filled(parser, argv)
        args.as_begun = {name: value for name, value in begun.items() if value != getattr(before, name)}
    if len(args.report_to) > 1 and "none" in args.report_to:
        parser.error("--report-to none goes alone: leave it out, or the others")
    if args.max_prompt_length >= args.max_length:
        parser.error(
            f"--max-prompt-length {args.max_prompt_length} leaves no room for a response within "
            f"--max-length {args.max_length}: make it smaller"
        )
    if getattr(args, "lora_r", None) == 0:
        idle = {"lora_target_modules", "lora_dropout", "lora_alpha", "save_merged", "adapter"} & args.typed
        if idle:  # a flag that does nothing is a misunderstanding: say so
            parser.error(
                f"--{min(idle).replace('_', '-')} has no effect with --lora-r 0 (no LoRA): leave one of them out"
            )
        args.save_merged = False  # of a file for LoRA too; the model that is saved is whole
    if getattr(args, "lora_target_modules", None):  # q_proj,v_proj is how LLaMA-Factory writes two
        args.lora_target_modules = [name for word in args.lora_target_modules for name in word.split(",") if name]
    return args


def take_toy(args, *paths):
    """Set the `paths` to the toy world of --model, unless they were given with it: a file's go with its model."""
    if args.model in toys.FOLDERS:
        given = args.typed if "model" in args.typed else args.given
        vars(args).update((name, args.model) for name in paths if name not in given)


def _filled(parser, argv):
    """parser.parse_args, with the defaults that follow from another flag."""
    args = parser.parse_args(argv)
    lora_rate, args.full_rate = parser.rates
    if args.learning_rate is None:
        args.learning_rate = lora_rate if getattr(args, "lora_r", None) else args.full_rate
    if args.max_prompt_length is None:
        follows = "max_length" in args.given
        args.max_prompt_length = args.max_length // 2 if follows else parser.max_prompt_length
    if args.tokens_per_microbatch is None:
        args.tokens_per_microbatch = 0 if "batch_size" in args.given else "auto"
    return args


def _begun_with(args):
    """The flags of the run that --resume goes on with, {name: value}; {} unless its args.json is as it was written."""
    if args.resume == "none":
        return {}
    folder = Path(args.output_dir) if args.resume == "auto" else Path(args.resume).parent
    listed = written_files.read(folder).get("args.json")
    if not listed or not written_files.is_as_listed(folder / "args.json", listed):
        return {}
    flags = read_object(folder / "args.json")
    own = {"resume", "overwrite", "output_dir", "config", "estimate_memory"}
    return {name: value for name, value in flags.items() if name in vars(args).keys() - own}
