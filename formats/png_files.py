"""PNG files without a library: pixels, and a description in a text chunk, which no model sees."""

import struct
import zlib

NAME = b"Description\0"


def png(image, description="") -> bytes:
    """The file of a picture, uint8 (H, W, 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    # 8 bits a channel, RGB, not interlaced; then lines with a 0 before each: it is not filtered.
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)
    text = NAME + description.encode("latin-1")
    lines = b"".join(b"\0" + bytes(row) for row in image.flatten(1).tolist())
    chunks = chunk(b"IHDR", header), chunk(b"tEXt", text), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def description(data) -> str:
    """Of a file's bytes; nothing where it has none."""
    before, _, behind = data.partition(b"tEXt" + NAME)
    length = int.from_bytes(before[-4:], "big") - len(NAME)
    return behind[: max(0, length)].decode("latin-1")
