"""The flags of the scripts: `--output-dir` and `--output_dir` are the same flag, a YAML file can hold flags, and a
user's mistake is one sentence and exit code 2 (3 when a run goes non-finite), without a traceback.
"""

import argparse
import difflib
import glob
import math
import os
import re
import signal
import sys
import time

import yaml

import hub_files

MOST = {int: 2**31 - 1, float: 1e30}  # of a flag that names no bound of its own: what no run has, and fp32 still holds
ADVICE = "nothing is saved; try a smaller --learning-rate, --dtype fp32, or look for broken weights or data"


class NonFinite(FloatingPointError):
    """The run went non-finite, in one sentence."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with both spellings, --config FILE.yaml, and errors of one sentence."""

    def __init__(self, doc):
        super().__init__(
            description=doc,
            allow_abbrev=False,
            formatter_class=lambda prog: _Help(prog, max_help_position=36, width=110),
        )
        self.where = ""
        self.add_argument("--config", metavar="FILE.yaml", help="a file with flags; the command line wins")
        what = "where models and datasets that are no folders come from"
        self.add_argument("--hub", choices=hub_files.HUBS, default=hub_files.HUBS[0], help=what)
        # Launchers append it; the environment they also set is what counts.
        self.add_argument("--local-rank", type=number(int, least=-1), help=argparse.SUPPRESS)

    def parse_args(self, argv=None):
        """Namespace of the flags; `args.typed` names those on the command line, `args.given` those in the file too."""
        argv = [_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
        args, words = argparse.Namespace(), []
        for index, word in enumerate(argv):
            if word.partition("=")[0] == "--config":
                file = word.partition("=")[2] or "".join(argv[index + 1 : index + 2])
                in_file, self.where = self._read_config(file), f"{file}: "
                args, self.where = self._parse(in_file, args), ""
                words += in_file
        args = self._parse(argv, args)
        args.typed, args.given = self._names(argv), self._names(words + argv)
        hub_files.use(args.hub)
        return args

    def _names(self, words):
        words = {word.partition("=")[0] for word in words}
        return {action.dest for action in self._actions if words.intersection(action.option_strings)}

    def _parse(self, words, args):
        for name, _, value in (word.partition("=") for word in words):
            if value == "--" and name in self._option_string_actions:  # argparse would make it an empty list
                self.error(f"{name}: expected a value, got '--'")
        args, unknown = self.parse_known_args(words, args)
        if unknown:
            self.error(f"unknown flag {unknown[0]}{self._nearest(unknown[0].partition('=')[0])}")
        return args

    def _nearest(self, word):
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        known = [option for action in shown for option in action.option_strings]
        nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
        return f"; did you mean {nearest[0]}?" if nearest else "; --help lists them"

    def _read_config(self, file):
        """A YAML file as command-line words; `lora: {r: 8}` is --lora-r 8, `use_lora: false` is --lora-r 0."""
        try:
            with open(file, encoding="utf-8") as text:
                config = yaml.load(text, AsWritten) or {}
        except Exception as error:  # PyYAML's own, and what `!!int x`, `!!timestamp x` or 5,000 brackets raise in it
            self.error(f"--config {file} cannot be read ({' '.join(str(error).split())})")
        if not isinstance(config, dict):
            self.error(f"--config {file} is not a list of `flag: value` lines")
        lora = config.pop("lora", None) or {}
        if not isinstance(lora, dict):
            self.error(f"{file}: `lora:` is not a block of `r:`, `alpha:`, `dropout:`, `target_modules:`")
        config |= {f"lora_{key}": value for key, value in lora.items()}
        if not self._switch(file, "use_lora", config.pop("use_lora", "true")):
            config["lora_r"] = 0
        words = []
        for key, value in config.items():
            option = _hyphens(f"--{key}")
            action = self._option_string_actions.get(option)
            if action is None:
                self.error(f"{file}: unknown key {key}{self._nearest(option)}")
            if action.nargs == 0:
                words += [option] if self._switch(file, key, value) else []
            elif isinstance(value, list):
                words += [option, *map(str, value)]
            elif value is not None:
                words.append(f"{option}={value}")
        return words

    def _switch(self, file, key, value):
        if str(value).lower() not in SWITCHES:
            self.error(f"{file}: {key} is true or false, not {value!r}")
        return SWITCHES[value.lower()]

    def error(self, message):
        message = re.sub(r"^argument (--[^/:]+)[^:]*", r"\1", message)  # the canonical name, without the aliases
        say(f"{self.prog}: {self.where}{message}")
        sys.exit(2)


class AsWritten(yaml.SafeLoader):
    """YAML whose values are the words that stand there, or null: `010` is no 8, `1:30` no 90, `yes` no true."""

    yaml_implicit_resolvers = {
        first: [(tag, shape) for tag, shape in known if tag.rpartition(":")[2] in ("null", "merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The script's docstring as it stands, and behind every flag's help its default where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _hyphens(word):
    """--output_dir=a_b -> --output-dir=a_b; values stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


# -- types: ArgumentTypeError's text is shown behind the flag's name ----------------------------------------------


def number(kind, above=None, least=None, below=None, most=None):
    """An argparse type: int or float within bounds, at most MOST of its kind unless another bound is given."""
    if below is None and most is None:
        most = MOST[kind]
    if above is None and least is None:
        least = -most

    def parse(text):
        shown = text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"
        try:
            value = kind(text)
        except ValueError:
            if kind is not int or not re.fullmatch(r"\s*[-+]?[\d_]+\s*", text):
                what = "a whole number" if kind is int else "a number"
                raise argparse.ArgumentTypeError(f"expected {what}, got {shown!r}") from None
            value = -math.inf if "-" in text else math.inf  # Python reads no more than 4,300 digits
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"has to be finite, got {shown}")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"has to be above {above}, got {shown}")
        if least is not None and not value >= least:
            raise argparse.ArgumentTypeError(f"has to be at least {least}, got {shown}")
        if below is not None and not value < below:
            raise argparse.ArgumentTypeError(f"has to be below {below}, got {shown}")
        if most is not None and not value <= most:
            raise argparse.ArgumentTypeError(f"has to be at most {most}, got {shown}")
        return value

    return parse


def add_common_flags(
    parser,
    epochs=1,
    batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=5e-6,
    lora_dropout=0.0,
    max_length=512,
    max_prompt_length=256,
    output_dir="outputs",
    adapter=True,
):
    """The flags that every training script has, with that script's documented defaults; adapter: those of LoRA too."""
    add, count, natural = parser.add_argument, number(int, least=0), number(int, least=1)
    rate, positive, share = number(float, least=0), number(float, above=0), number(float, least=0, below=1)
    length, tokens = number(int, least=2, most=10**7), number(int, least=1, most=10**7)  # as of the longest contexts
    # data
    add("--num-samples", type=count, default=0, metavar="N", help="rows to read; 0: all")
    add("--eval-samples", type=count, metavar="N", help="pairs held out; 0: none (default: 10 %%, at most 100)")
    add("--max-length", type=length, default=max_length, metavar="N", help="tokens of prompt + response")
    add("--max-prompt-length", type=tokens, default=max_prompt_length, metavar="N", help="tokens of the prompt")
    add("--chat-template-strings", action="store_true", help="put plain strings through the chat template")
    add("--skip-invalid", action="store_true", help="leave malformed rows out instead of stopping at the first")
    if adapter:
        rank = number(int, least=0, most=65_536)
        add("--lora-r", type=rank, default=16, metavar="R", help="rank; 0: train all weights")
        add("--lora-alpha", type=positive, default=32, metavar="A", help="the adapter is scaled by A / R")
        add("--lora-dropout", type=share, default=lora_dropout, metavar="P", help="on the adapter's input")
        what = "layers to adapt (default: all linears of the blocks)"
        add("--lora-target-modules", nargs="+", metavar="NAME", help=what)
        what = "also write a whole model, adapter merged, to OUTPUT_DIR/merged"
        add("--save-merged", action="store_true", help=what)
    # optimisation
    names = "--epochs", "--num-epochs", "--num-train-epochs"
    add(*names, type=natural, default=epochs, metavar="N", help="passes over the data")
    add("--max-steps", type=count, default=0, metavar="N", help="updates at most; 0: all of the epochs")
    add("--batch-size", type=natural, default=batch_size, metavar="B", help="pairs per device and pass")
    accumulation = gradient_accumulation_steps
    add("--gradient-accumulation-steps", type=natural, default=accumulation, metavar="N", help="passes per update")
    add(
        "--tokens-per-microbatch",
        type=count,
        default=0,
        metavar="T",
        help="passes of at most T tokens instead of B pairs; an update has the same pairs (0: off)",
    )
    add("--learning-rate", type=positive, default=learning_rate, metavar="LR", help="AdamW's rate at its highest")
    add("--warmup-steps", type=count, default=0, metavar="N", help="updates over which the rate rises from 0")
    add("--lr-scheduler", choices=("linear", "cosine", "constant"), default="linear", help="how the rate falls")
    add("--weight-decay", type=rate, default=0.0, metavar="W", help="of AdamW")
    add("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="adamw8bit: 8-bit moments (bitsandbytes)")
    add("--optimizer-offload", action="store_true", help="AdamW's moments in the CPU's memory: slower")
    add("--max-grad-norm", type=rate, default=1.0, metavar="G", help="clip the gradient's norm; 0: no clipping")
    # machine
    add(
        "--seed", type=number(int, least=0, below=2**63), default=42, metavar="N", help="of shuffle, split and LoRA's A"
    )
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the base model's weights")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="where to train")
    modes = "auto", "on", "off"
    what = "how long a rank waits for the others before it ends"
    add("--ddp-timeout", type=number(int, least=1, most=10**6), default=600, metavar="SECONDS", help=what)
    add("--gradient-checkpointing", choices=modes, default="auto", help="slower, less memory; auto: where it is needed")
    what = "say what memory the run will take, from the model's config alone, and end"
    add("--estimate-memory", action="store_true", help=what)
    add("--trust-remote-code", action="store_true", help="run model code that comes with the weights")
    # what the run leaves
    add("--output-dir", default=output_dir, metavar="DIR", help="where the run goes")
    add(
        "--cache-dir",
        metavar="DIR",
        help="numbers of frozen models, kept for later runs (default: in the output folder)",
    )
    add("--logging-dir", metavar="DIR", help="what --report-to writes (default: logs in the output folder)")
    reporters = "auto", "tensorboard", "wandb", "swanlab", "none"
    what = f"some of {', '.join(reporters)}; auto: TensorBoard where it is installed"
    add("--report-to", nargs="+", choices=reporters, default="auto", metavar="TRACKER", help=what)
    add("--logging-steps", type=natural, default=10, metavar="N", help="updates between two log lines")
    add("--eval-steps", type=count, default=0, metavar="N", help="updates between evaluations; 0: first and last only")
    add("--save-steps", type=count, default=0, metavar="N", help="updates between checkpoints; 0: none")
    add("--save-total-limit", type=count, default=0, metavar="N", help="checkpoints to keep, the newest; 0: all")
    add("--resume", default="none", metavar="none|auto|DIR", help="go on from the newest whole checkpoint, or from DIR")
    add("--overwrite", action="store_true", help="replace the run that the output folder holds")


def check_common_flags(parser, args):
    """What no single flag can see."""
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


def take_toy(args, *paths):
    """Set the `paths` to `toy` with --model toy, unless they were given with it: those of a file go with its model."""
    if args.model == "toy":
        given = args.typed if "model" in args.typed else args.given
        vars(args).update((name, "toy") for name in paths if name not in given)


# -- numbers that are not finite -----------------------------------------------------------------------------------


def check_weights(parameters, step):
    """Raise NonFinite unless all are finite, of sharded ones those of this rank."""
    if not all(getattr(p, "to_local", lambda p=p: p)().isfinite().all() for p in parameters):
        raise NonFinite(f"step {step} left weights that are not finite: {ADVICE}")


def check_norms(norms, step, scaler):
    """Raise NonFinite for a gradient norm that is not finite, unless an fp16 scaler can still give way.

    norms: of the updates up to `step`, floats.
    """
    for at_step, norm in enumerate(norms, step - len(norms) + 1):
        if not math.isfinite(norm) and scaler.get_scale() <= 1:  # 1: no scaler, or it has nothing left to give
            raise NonFinite(f"the gradient is {norm} at step {at_step}: {ADVICE}")


def check_held_out(loss, step):
    """Raise NonFinite for a held-out loss that is not finite."""
    if not math.isfinite(loss):
        raise NonFinite(f"the held-out loss is {loss} at step {step}: {ADVICE}")


# -- exit codes ----------------------------------------------------------------------------------------------------


def say(sentence):
    """One line on standard error, from one process per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(" ".join(sentence.split()), file=sys.stderr, flush=True)


def run(main, args, *user_errors):
    """main(args); one of `user_errors` becomes its sentence and exit code 2, NonFinite 3, a rank that is gone 1."""
    prog = os.path.basename(sys.argv[0])
    try:
        main(args)
    except user_errors as error:
        _end(f"{prog}: {error}", 2)
    except FloatingPointError as error:
        _end(f"{prog}: {error}", 3)
    except RuntimeError as error:
        if not _rank_is_gone(error):
            raise
        # From every rank: the one that speaks for this machine may be the one that is gone.
        reason = re.sub(r"\[[^]]*gloo[^]]*\] ?", "", str(error)).partition(". ")[0].splitlines()[0]
        sentence = f"rank {os.environ.get('RANK')} cannot reach another ({reason}): see what that one said last"
        if glob.glob(f"{getattr(args, 'output_dir', None)}/checkpoint-*"):
            sentence += "; --resume auto goes on from the last checkpoint"
        print(f"{prog}: {sentence}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        say(f"{prog}: interrupted")
        sys.exit(130)


def _end(sentence, code):
    """Say why, and exit.  A rank that fails alone has to speak for itself; where the first process of the machine fails
    too, the launcher ends the others before they have waited for so long.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(" ".join(sentence.split()), file=sys.stderr, flush=True)
    sys.exit(code)


def _rank_is_gone(error):
    """Whether an exchange failed because another rank died or does not answer: torch has no class for it."""
    text = str(error)
    of_exchange = "gloo" in text.lower() or type(error).__name__.startswith("Dist")
    words = "closed|closure|reset|refused|roken pipe|imed out|remote process exited"
    return of_exchange and bool(re.search(words, text))
