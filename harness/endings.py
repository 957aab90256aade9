"""How a script ends: what each kind of exception says, and with which exit code.

0    all is written
1    another rank is gone; or a fault of ours, with its traceback and where to report it
2    the user's, in one sentence: a mistake (UserError), a file that cannot be read or written, too little memory
3    numbers that are not finite (FloatingPointError), in one sentence
129, 130, 143    asked to end by SIGHUP, SIGINT (Ctrl-C), SIGTERM; what was done is saved (checkpoints.Termination)
"""

import errno
import glob
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress

from formats.user_errors import UserError, is_out_of_memory
from harness import interrupted, is_alone, locks, speaks

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ADVICE = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EROFS: "choose another place to write to",
    errno.EACCES: "choose a place that you may use",
    errno.EPERM: "choose a place that you may use",
    errno.ENAMETOOLONG: "choose a shorter name",
}
ADVICE_ON_MEMORY = "try a smaller --batch-size, or see what a run needs with --estimate-memory"
advise_on_memory = None  # of a run: words in the place of these, found out when memory has run out


def run(main, args):
    """main(args), and the end of the process for what it raises, as above; our own faults stay exceptions."""
    global advise_on_memory
    advise_on_memory, prog = None, os.path.basename(sys.argv[0])
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler is signal.SIG_DFL and is_alone():  # a rank may wait for another where no handler is heard
            signal.signal(number, _ended_by)  # until checkpoints.Termination takes it
    try:
        main(args)
    except FloatingPointError as error:
        _end(f"{prog}: {error}", 3)
    except KeyboardInterrupt:
        say(f"{prog}: interrupted{_way_on(args)}")
        sys.exit(130)
    except Ended as ended:
        (number,) = ended.args
        say(f"{prog}: ended by {signal.Signals(number).name}{_way_on(args)}")
        sys.exit(128 + number)
    except Exception as error:
        if sentence := sentence_of(error):
            way_on = "" if isinstance(error, UserError) else _way_on(args)
            _end(f"{prog}: {sentence}{way_on}", 2)
        if not _rank_is_gone(error):
            raise
        # From every rank: the one that speaks for this machine may be the one that is gone.
        reason = re.sub(r"\[[^]]*gloo[^]]*\] ?", "", str(error)).partition(". ")[0].splitlines()[0]
        sentence = f"rank {os.environ.get('RANK')} cannot reach another ({reason}): see what that one said last"
        print(f"{prog}: {sentence}{_way_on(args)}", file=sys.stderr)
        sys.exit(1)
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # it ends as it is
        locks.release()
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Ended(BaseException):
    """SIGTERM or SIGHUP, by its number: what is half written is removed on the way out."""


def _ended_by(number, _):
    raise Ended(number)


@contextmanager
def held():
    """Signals that ask for an end wait until the block is through."""
    if threading.current_thread() is not threading.main_thread():  # which alone is asked
        yield
        return
    asked, handlers = [], {}
    for number in SIGNALS:
        handlers[number] = signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in asked:
            signal.raise_signal(number)


def sentence_of(error):
    """What to tell the user of an exception that is the user's or the machine's; None for a fault of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if is_out_of_memory(error):
        return _too_little_memory(text)
    if isinstance(error, OSError) and error.errno:
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{place}{os.strerror(error.errno)}: {ADVICE.get(error.errno, 'check the path')}"
    if type(error).__name__ == "SafetensorError":  # its library is not loaded for --help
        code = int((re.search(r"os error (\d+)", text) or [0, 0])[1])
        return f"{text}: {ADVICE.get(code, 'a file of weights is damaged, or cannot be written')}"
    return None


def _too_little_memory(text):
    """The sentence about an allocation that failed, of which torch says this text."""
    kind = "GPU memory" if "CUDA" in text else "memory"
    asked = re.search(r"[Tt]ried to allocate ([0-9.]+ [A-Za-z]+)", text)
    in_words = f"{asked[1]} more could not be had" if asked else re.split(r"\. (?=[A-Z])", text)[0] or "MemoryError"
    advice = ADVICE_ON_MEMORY
    if advise_on_memory:
        with suppress(Exception):  # it needs memory too
            advice = advise_on_memory()
    return f"there is not enough {kind} ({in_words}): {advice}"


def say(sentence):
    """One line on standard error, from one process per machine."""
    if speaks():
        print(" ".join(sentence.split()), file=sys.stderr, flush=True)


def begin_program():
    """For a process that is a script of ours and nothing else: no output can end it, and its faults say what to do."""
    sys.excepthook = _uncaught
    _set_up_cuda()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # what is ignored stays so
        signal.signal(signal.SIGINT, interrupted)  # `run` puts it back.  C++ that is loaded may die of an exception
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # what is piped in may be no text
    sys.stdout, sys.stderr = (_unbroken(stream) for stream in (sys.stdout, sys.stderr))


def _set_up_cuda():
    """What has to be set before torch is loaded, unless the user has."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # number GPUs as nvidia-smi does, not the fastest first
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys() and os.name != "nt":
        # No two passes have one length: what they leave would be gaps between segments of fixed size.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


class _Unbroken(io.FileIO):
    """An output that may end before the program does: `| head`, a closed terminal, a log on a full disk."""

    def write(self, content):
        try:
            return super().write(content)
        except OSError:
            return len(content)


def _unbroken(stream):
    """The same output, which takes any text and ends nothing; what is none of the system's files stays as it is."""
    try:
        file = _Unbroken(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError, ValueError):  # none at all, as under pythonw; or a notebook's
        return stream
    stream.flush()
    line_buffering = stream is sys.stderr or stream.isatty()
    # backslashreplace: a terminal that has no Chinese.
    return io.TextIOWrapper(io.BufferedWriter(file), stream.encoding, "backslashreplace", line_buffering=line_buffering)


def _uncaught(kind, error, trace):
    if kind is KeyboardInterrupt:
        interrupted()
    prog = os.path.basename(sys.argv[0])
    traceback.print_exception(kind, error, trace)
    what = "the lines above, the command, and args.json of the output folder if it is there"
    print(f"{prog}: this is a fault of the program, not yours: please report it with {what}", file=sys.stderr)


def _way_on(args):
    """What a sentence about an early end adds where something is there to go on from."""
    folder = getattr(args, "output_dir", None)
    if glob.glob(f"{glob.escape(str(folder))}/checkpoint-*"):
        return "; --resume auto goes on from the last checkpoint"
    begun = f"{getattr(args, 'output', None)}.args.json", f"{folder}/sampled.jsonl.args.json"
    return "; the same command goes on behind what is written" if any(map(os.path.exists, begun)) else ""


def _end(sentence, code):
    """Say why, and exit.  A rank that fails alone has to speak for itself; where the first process of the machine fails
    too, the launcher ends the others before they have waited for so long.
    """
    if not speaks():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(" ".join(sentence.split()), file=sys.stderr, flush=True)
    sys.exit(code)


def _rank_is_gone(error):
    """Whether an exchange failed because another rank died or does not answer: torch has no class for it."""
    text = str(error)
    of_exchange = "gloo" in text.lower() or type(error).__name__.startswith("Dist")
    words = "closed|closure|reset|refused|roken pipe|imed out|remote process exited"
    return isinstance(error, RuntimeError) and of_exchange and bool(re.search(words, text))
