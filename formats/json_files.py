"""JSON as it is read here, of records and of rows: what Python's reader dies of or takes in silence is no JSON."""

import json
import reprlib
from pathlib import Path


class NotJSON(ValueError):
    """JSON to Python's parser, and nothing to anybody."""


def parse_json(text):
    """JSON.  Raises json.JSONDecodeError, or NotJSON for what Python cannot hold and for a key that stands twice."""

    def once(pairs):
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            raise NotJSON(f"`{next(key for key in keys if keys.count(key) > 1)}` stands twice")
        return row

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise NotJSON("nested too deeply") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | NotJSON):
            raise
        raise NotJSON("a number of thousands of digits") from None


# -- records: files with one object ----------------------------------------------------------------------------------


def read_object(path):
    """{key: value} of a file.  Raises OSError, and ValueError for what is not UTF-8, not JSON or no object."""
    record = parse_json(Path(path).read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise NotJSON("no object {...}")
    return record


def wrong_value(record, expected):
    """`key=value, and it has to be ...` of the first value of a record that is not as expected, or None.

    expected: {key: (what it has to be, in words, and whether a value is that)}; a key that is missing is null.
    """
    for key, (words, is_right) in expected.items():
        if not is_right(record.get(key)):
            return f"{key}={reprlib.repr(record.get(key))}, and it has to be {words}"
    return None


def is_number(value):
    """Whether it is a number that fp32 holds, and not NaN."""
    return type(value) in (int, float) and abs(value) <= 1e30
