"""Pictures of raw rows -> files named by the sha256 of what is in them, so that each is there once."""

import hashlib

from formats import row_pictures
from formats.row_files import Malformed

MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8\xff", "gif": b"GIF8"}  # the first bytes of each


def keep(picture, source, folder):
    """The name of the file that a picture in a row becomes, written to a folder.  Raises Malformed.

    picture, source: as in row_pictures.read.
    """
    _, data, name = row_pictures.read(picture, source)
    file = folder / f"{hashlib.sha256(data).hexdigest()}.{kind_of(data, name)}"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return file.name


def kind_of(data, name):
    """The end of a picture's file name, by its first bytes.  Raises Malformed."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "bmp"
    for kind, magic in MAGIC.items():
        if data.startswith(magic):
            return kind
    kinds = ", ".join((*MAGIC, "webp", "bmp"))
    raise Malformed(f"{name} is none by its first bytes, which are not those of {kinds} or tiff")
