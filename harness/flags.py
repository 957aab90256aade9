"""How scripts read flags: `--output-dir` and `--output_dir` are the same flag, a YAML file can hold flags, and a
user's mistake is one sentence and exit code 2 (3 when a run goes non-finite), without a traceback.
"""

import argparse
import difflib
import math
import re
import shutil
import sys
import textwrap

import yaml

from formats import hub_files
from harness import endings
from harness.flag_names import INSTEAD, SAME, VALUES

MOST = {int: 2**31 - 1, float: 1e30}  # of a flag that names no bound of its own: what no run has, and fp32 still holds
MAY_BE_EMPTY = ("preference_text",)  # which then asks for nothing, and is a preference all the same
WITHOUT_LORA = "--use-lora", "--use-peft", "--finetuning-type"  # false or full is --lora-r 0
NUMBER = r"\d[\d.]*?(?:[eE][-+]?\d+)?"
ADVICE = "nothing is saved; try a smaller --learning-rate, --dtype fp32, or look for broken weights or data"


class NonFinite(FloatingPointError):
    """The run went non-finite, in one sentence."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with both spellings, other trainers' names (flag_names.py), --config FILE.yaml,
    and errors of one sentence.
    """

    def __init__(self, doc):
        super().__init__(
            usage="%(prog)s [--config FILE.yaml] [--flag value ...]",
            description=doc,
            epilog="--a-flag and --a_flag are the same; so are names of TRL and LLaMA-Factory that mean the same.",
            allow_abbrev=False,
            formatter_class=_Help,
        )
        self.where = ""
        self.add_argument("--config", metavar="FILE.yaml", help="a file with flags; the command line wins")
        text = "where models and datasets that are no folders come from"
        self.add_argument("--hub", choices=hub_files.HUBS, default=hub_files.HUBS[0], help=text)
        # Launchers append it; the environment they also set is what counts.
        self.add_argument("--local-rank", type=number(int, least=-1), help=argparse.SUPPRESS)

    def group(self, title):
        """add_argument of the part of --help with that title."""
        for group in self._action_groups:
            if group.title == title:
                return group.add_argument
        return self.add_argument_group(title).add_argument

    def parse_args(self, argv=None):
        """Namespace of the flags; `args.typed` names those on the command line, `args.given` those in the file too."""
        if argv is None:  # a script of its own, which loads torch from here on
            endings.begin_program()
        argv = self._ours(map(str, sys.argv[1:] if argv is None else argv))
        args, words = argparse.Namespace(), []
        for index, word in enumerate(argv):
            if word.partition("=")[0] == "--config":
                file = word.partition("=")[2] or "".join(argv[index + 1 : index + 2])
                if fault := fault_of(file):
                    self.error(f"--config {fault}")
                self.where = f"{file}: "
                in_file = self._read_config(file)
                args, self.where = self._parse(in_file, args), ""
                words += in_file
        args = self._parse(argv, args)
        args.typed, args.given = self._names(argv), self._names(words + argv)
        hub_files.use(args.hub)
        return args

    def _names(self, words):
        words = {word.partition("=")[0] for word in words}
        return {action.dest for action in self._actions if words.intersection(action.option_strings)}

    def _has(self, words):
        return all(word in self._option_string_actions for word in words.split() if word.startswith("--"))

    def _name(self, word):
        """The flag that a word is in this script: hyphens for underscores, ours for the name of another trainer."""
        name = _hyphens(word).partition("=")[0]
        return SAME[name] if name in SAME and not self._has(name) and self._has(SAME[name]) else name

    def _values(self, name):
        """{value: our words} of a switch, and of a flag that flag_names.VALUES knows, where this script has them."""
        action = self._option_string_actions.get(name)
        values = {"true": name, "false": ""} if action and action.nargs == 0 else VALUES.get(name, {})
        return values if self._has(" ".join(values.values())) else {}

    def _ours(self, words):
        """The words with our names and values in the place of other trainers', and switches without a value."""
        ours, words = [], list(words)
        while words:
            word = words.pop(0)
            name = self._name(word)
            _, equals, given = word.partition("=")
            values, action = self._values(name), self._option_string_actions.get(name)
            value_follows = bool(words) and not equals and not words[0].startswith("--")
            value = given if equals else words[0] if value_follows else "true"
            if value not in values:
                value = str(SWITCHES.get(value.lower(), value)).lower()
            if value in values:
                ours += values[value].split()
                if value_follows:
                    words.pop(0)
            elif not values or (action and action.nargs != 0):
                ours.append(name + equals + given)
            elif "true" in values and not equals:  # the word behind is no value
                ours += values["true"].split()
            else:
                self.error(f"{name} is {' or '.join(values)}, not {value!r}{self._hint(name)}")
        return ours

    def _parse(self, words, args):
        for name, _, value in (word.partition("=") for word in words):
            if value == "--" and name in self._option_string_actions:  # argparse would make it an empty list
                self.error(f"{name}: expected a value, got '--'")
        args, unknown = self.parse_known_args(words, args)
        if unknown:
            unknown = [word for word in unknown if word.startswith("--")] or unknown[:1]
            self.error("; ".join(f"unknown flag {word}{self._nearest(word.partition('=')[0])}" for word in unknown))
        for action in self._actions:
            given = getattr(args, action.dest, None)
            for text in given if isinstance(given, list) else [given]:
                if isinstance(text, str) and (fault := fault_of(text)) and (text or action.dest not in MAY_BE_EMPTY):
                    self.error(f"{action.option_strings[0]} {fault}")
        return args

    def _hint(self, name):
        """`: use --ours N` for a name of another trainer, of what this script has; else nothing."""
        for advice in INSTEAD.get(name, ()):
            if not advice.startswith("--"):
                return f": {advice}"
            if self._has(advice.split()[0]):
                return f": use {advice}"
        return ""

    def _nearest(self, word):
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        names = [name for action in shown for name in action.option_strings]
        nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
        return self._hint(word) or (f"; did you mean {nearest[0]}?" if nearest else "; --help lists them")

    def _read_config(self, file):
        """A YAML file as command-line words; `lora: {r: 8}` is --lora-r 8, `use_lora: false` is --lora-r 0."""
        try:
            with open(file, encoding="utf-8") as text:
                config = yaml.load(text, AsWritten) or {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8
            self.where = ""
            self.error(f"--config {file} cannot be read ({' '.join(str(error).split())})")
        if not isinstance(config, dict):
            self.error("not a list of `flag: value` lines")
        lora = config.pop("lora", None) or {}
        if not isinstance(lora, dict):
            self.error("`lora:` is not a block of `r:`, `alpha:`, `dropout:`, `target_modules:`")
        lines = [*config.items(), *((f"lora_{key}", value) for key, value in lora.items())]
        lines.sort(key=lambda line: self._name(f"--{line[0]}") in WITHOUT_LORA)  # last: they overrule the rank
        words, unknown, key_of = [], [], {}  # key_of: the key that sets a flag
        for key, value in lines:
            name = self._name(f"--{key}")
            action = self._option_string_actions.get(name)
            if not action and not self._values(name):
                unknown.append(f"unknown key {key}{self._nearest(name)}")
            elif value is not None or not action or action.nargs == 0:
                if action and action.dest in key_of:
                    self.error(f"{key_of[action.dest]} and {key} both are {name}: keep one of them")
                if action:
                    key_of[action.dest] = key
                words += self._words_of(key, value, name)
        if unknown:
            self.error("; ".join(unknown))
        return words

    def _words_of(self, key, value, name):
        """A line `key: value` of a file, of the flag `name`, as words of the command line."""
        action = self._option_string_actions.get(name)
        if name == "--config":
            self.error(f"{key}: a file cannot name another: give both on the command line")
        if isinstance(value, dict):
            self.error(f"{key}: a block of keys is no value for it")
        if not isinstance(value, list):
            return self._ours([f"{name}={value}"])
        if not (action and action.nargs):
            self.error(f"{key}: pick one of {', '.join(map(str, value))}")
        for part in value:
            if isinstance(part, dict | list) or str(part).startswith("-"):  # "-": it would be a flag of its own
                self.error(f"{key}: {part} is no value for it")
        return self._ours([name, *map(str, value)])

    def error(self, message):
        message = re.sub(r"^argument (--[^/:]+)[^:]*", r"\1", message)  # the canonical name, without the aliases
        endings.say(f"{self.prog}: {self.where}{message}")
        sys.exit(2)


class AsWritten(yaml.SafeLoader):
    """YAML whose values are the words that stand there, or null: `010` is no 8, `1:30` no 90, `yes` no true; and whose
    keys stand there once.
    """

    yaml_implicit_resolvers = {
        first: [(tag, shape) for tag, shape in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # no others: `!!float 5` would be 5.0
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("str", "null", "seq", "map")
    }

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value]
        for place, key in enumerate(keys):
            if key.value in [before.value for before in keys[:place]]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """As wide as the terminal; a flag under its first name, the others behind its help, then its default if any."""

    def __init__(self, prog):
        width = min(shutil.get_terminal_size().columns, 120)
        super().__init__(prog, max_help_position=24 if width < 100 else 34, width=width)

    def _format_action_invocation(self, action):
        names = action.option_strings
        action.option_strings = names if "-h" in names else names[:1]
        text = super()._format_action_invocation(action)
        action.option_strings = names
        return text

    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS)
        text = re.sub(r" \(default: .*\)$", "", action.help) if shown else action.help  # a script set another
        aliases = [] if "-h" in action.option_strings else action.option_strings[1:]
        remarks = []
        if shown:
            remarks.append("default: %(default)s")
        if aliases:
            remarks.append(f"also {', '.join(aliases)}")
        return f"{text} ({'; '.join(remarks)})" if remarks else text

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # a flag's name stays whole

    def _fill_text(self, text, width, indent):
        """The docstring: what is indented as it stands, the rest filled, without the files to copy."""
        parts = [part for part in text.strip().split("\n\n") if not part.startswith("Copy with:")]
        fill = lambda part: textwrap.fill(part, width, break_on_hyphens=False)
        return "\n\n".join(part if "\n " in f"\n{part}" else fill(part) for part in parts)


def _hyphens(word):
    """--output_dir=a_b -> --output-dir=a_b; values stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def fault_of(text):
    """Why a text is no name of a file or of anything else that a flag asks for, or None."""
    if not text:
        return "is empty: give it a value, or leave it out (a variable of the shell that is not set is empty too)"
    if "\0" in text:
        return "has a zero byte in it, which no name has"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "has bytes that are no UTF-8: rename the file or folder"
    return None


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
            value = kind(re.sub(r"\.0*$", "", text) if kind is int else text)  # 3.0 of other trainers' files
        except ValueError:
            if re.fullmatch(rf"{NUMBER}\s*(-|–|~|\.\.|,|to|至|到)\s*{NUMBER}", text.strip()):  # a document's advice
                raise argparse.ArgumentTypeError(f"pick one number of {shown}") from None
            if kind is not int or not re.fullmatch(r"\s*[-+]?[\d_]+\s*", text):
                expected = "a whole number" if kind is int else "a number"
                raise argparse.ArgumentTypeError(f"expected {expected}, got {shown!r}") from None
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
