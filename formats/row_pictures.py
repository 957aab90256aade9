"""The pictures of a row: what stands for them in it, and their bytes.  Nothing is decoded here."""

import json
from pathlib import Path

from formats.row_files import Malformed
from formats.row_prompts import PICTURES

WRITTEN = "<image>"  # how a text says where a picture stands


def take(row, mark):
    """(row without its pictures, what stands for each of them).  Raises Malformed.

    mark: the text that takes the place of each part of a message that is a picture.  RLHF-V's `text`, which is JSON
    with question, chosen and rejected, becomes these.
    """
    column = next((name for name in PICTURES if row.get(name)), None)
    if not column:
        return row, []
    given = row[column] if isinstance(row[column], list) else [row[column]]
    row = {name: value for name, value in row.items() if name not in PICTURES}
    if isinstance(row.get("text"), str) and not row.keys() & {"chosen", "rejected"}:
        asked = _parsed(row.pop("text"))
        row.pop("image_path", None)
        row |= asked
    return {name: _marked(value, mark) for name, value in row.items()}, given


def read(picture, source):
    """(its path or bytes, its bytes, what a sentence calls it) of a picture in a row.  Raises Malformed.

    source: of the rows; a path is relative to its folder.
    """
    if isinstance(picture, dict):  # of a dataset on a hub
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        return picture, picture, "a picture, given as bytes,"
    if not isinstance(picture, str):
        raise Malformed(f"a picture is neither a path nor bytes, but of type {type(picture).__name__}")
    path = Path(source if Path(source).is_dir() else Path(source).parent, picture)
    try:
        return path, path.read_bytes(), f"the picture {path}"
    except FileNotFoundError:
        raise Malformed(f"there is no picture {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a path
        raise Malformed(f"the picture {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def check_places(num_marks, num_pictures):
    """Raise Malformed where a prompt has places for other than all of its pictures; without any they come first."""
    if num_marks not in (0, num_pictures):
        raise Malformed(f"it has {num_pictures} pictures, and {num_marks} places for them in its prompt")


def _parsed(text):
    try:
        asked = json.loads(text)
    except ValueError as error:
        raise Malformed(f"`text` is no JSON ({error})") from None
    if not isinstance(asked, dict):
        raise Malformed("`text` is no JSON object")
    return asked


def _marked(value, mark):
    """A column with the mark as a text for each part of a message that is a picture."""
    if isinstance(value, list):
        return [_marked(part, mark) for part in value]
    if isinstance(value, dict):
        if value.get("type") == "image" and "role" not in value:
            return {"type": "text", "text": mark}
        return {name: _marked(part, mark) if name == "content" else part for name, part in value.items()}
    return value
