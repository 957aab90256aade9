"""A reward of the user's own: a function(prompt, response) -> number in a file of theirs, which is run."""

import math
import reprlib
import traceback
from pathlib import Path
from types import ModuleType

from formats.user_errors import UserError
from tools.prompts import text_of

LARGEST = 1e30  # of a reward, whose square has to be a number too


class RewardFunctionError(UserError):
    """A reward function that cannot be used: one sentence for the user."""


def load(name):
    """The function of FILE.py:FUNCTION; the file is run.  Raises RewardFunctionError."""
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise RewardFunctionError(f"--reward-fn: there is no file {file}: check the path")
    module = ModuleType("reward_file")
    module.__file__ = file
    try:  # not by import, which leaves a __pycache__ in the user's folder
        exec(compile(Path(file).read_bytes(), file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever a foreign file does
        raise RewardFunctionError(f"--reward-fn {file} cannot be run ({_words(error)})") from None
    if not callable(getattr(module, function, None)):
        raise RewardFunctionError(f"--reward-fn: {file} has no function {function}: check the name")
    return getattr(module, function)


def scores(function, prompts, texts):
    """Its reward for each text, a response to the Prompt beside it.  Raises RewardFunctionError."""
    return [
        call(function, text_of(prompt.prompt), text, prompt.where) for prompt, text in zip(prompts, texts, strict=True)
    ]


def call(function, prompt, response, where):
    """Its reward, a finite float.  Raises RewardFunctionError, which names the prompt by `where` (file:line)."""
    try:
        reward = function(prompt, response)
    except (Exception, SystemExit) as error:
        raise RewardFunctionError(f"--reward-fn fails on a response to {where} ({_words(error)})") from None
    try:
        number = math.nan if isinstance(reward, str) else float(reward)
    except (Exception, SystemExit):  # of a __float__ of theirs
        number = math.nan
    if not abs(number) <= LARGEST:
        raise RewardFunctionError(
            f"--reward-fn returns {_shown(reward)} for a response to {where}: it has to return a finite number "
            "(and none above 1e30)"
        )
    return number


def _words(error):
    """What went wrong and in which line of which file."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_shown(error, str)}, {place.filename}:{place.lineno}"


def _shown(value, as_text=reprlib.repr):
    try:
        return as_text(value)
    except (Exception, SystemExit):  # a __str__ of theirs; a number of more digits than Python shows
        return f"something of type {type(value).__name__}"
