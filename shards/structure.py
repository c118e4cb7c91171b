"""The structure of JPEG and PNG files: what the first picture is, and whether it is whole, without decoding it."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from struct import unpack_from

_EOI = b"\xff\xd9"
_SOS, _DQT_TO_COM = 0xDA, {0xC4, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_COMMON_FRAMES = {0xC0, 0xC1, 0xC2}
"""Baseline, extended and progressive with Huffman coding."""
# Between scans: a marker, but neither a stuffed zero, a restart marker nor a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_CRITICAL = {b"IHDR", b"PLTE", b"IDAT"}


class BrokenError(Exception):
    """The picture is cut off or damaged, or of a kind that no decoder here reads; the text says which."""


@dataclass(frozen=True)
class Structure:
    """The first picture of a file.

    ``unusual`` has the names of :class:`shards.images.Encoded`, except the orientation; ``exif`` is the EXIF block, in
    which the orientation stands; ``plain`` is False where only a decoder can tell more.  ``broken_notes`` are (start,
    end) of chunks that are no part of the picture and have a wrong checksum: decoders skip them.
    """

    width: int
    height: int
    unusual: tuple[str, ...] = ()
    exif: bytes = b""
    plain: bool = True
    broken_notes: tuple[tuple[int, int], ...] = ()


def of_jpeg(data: bytes) -> Structure | None:
    """Walk the markers of the first picture; None if its headers make no sense.

    Raises:
        BrokenError: it is cut off, its header is damaged, or it has 12 bits per channel.
    """
    size, exif, channels, plain = None, b"", 0, True
    place, end = 2, len(data)
    while place + 4 <= end:
        if data[place] != 0xFF:  # other decoders skip what is there; DALI refuses the image
            raise BrokenError(f"its header is damaged at byte {place}")
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == _SOS:
            break
        length = data[place + 2] << 8 | data[place + 3]
        if marker in _FRAMES:
            if length < 8 or place + 10 > end:
                return None
            depth, height, width, channels = unpack_from(">BHHB", data, place + 4)
            if depth != 8:
                raise BrokenError(
                    f"a JPEG with {depth} bits per channel, which no decoder here reads; convert it to 8 bits, "
                    "for instance with ImageMagick: convert IN -depth 8 OUT.png"
                )
            size, plain = (width, height), marker in _COMMON_FRAMES
        elif marker == 0xE1 and not exif and data[place + 4 : place + 10] == b"Exif\0\0":
            exif = data[place + 4 : place + 2 + length]
        place += 2 + length
    else:
        raise BrokenError("the file is truncated")
    if size is None or 0 in size:
        return None
    # One comparison settles nearly all files.  Behind the others' pictures lies something else: a video, a second picture.
    if not data.endswith(_EOI) and not _has_end(data, place):
        raise BrokenError("the file is truncated")
    unusual = ("CMYK",) if channels == 4 else ()
    return Structure(*size, unusual, exif, plain and channels in (1, 3, 4))


def _has_end(data: bytes, scan: int) -> bool:
    """Whether the picture whose first scan starts at ``scan`` has its end of image."""
    place = scan
    while place + 4 <= len(data):
        # ``place`` is at a segment: a scan's header, or tables between two scans.
        place += 2 + (data[place + 2] << 8 | data[place + 3])
        found = _MARKER.search(data, place)
        while found and data[found.start() + 1] not in _DQT_TO_COM | {_SOS, 0xD9}:
            found = _MARKER.search(data, found.start() + 2)
        if not found:
            return False
        place = found.start()
        if data[place + 1] == 0xD9:
            return True
    return False


def of_png(data: bytes) -> Structure | None:
    """Walk the chunks up to the end of the picture; None if its header makes no sense.

    Raises:
        BrokenError: it is cut off, or a chunk of the picture has a wrong checksum, which DALI refuses.
    """
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height, depth, colour = unpack_from(">IIBB", data, 16)
    if depth not in _PNG_DEPTHS.get(colour, ()) or not 0 < width < 1 << 31 or not 0 < height < 1 << 31:
        return None
    kinds: set[bytes] = set()
    exif, broken, place = b"", [], 8
    while place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length
        if kind == b"IEND":
            break
        if end > len(data):
            raise BrokenError("the file is truncated")
        if zlib.crc32(memoryview(data)[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            if kind in _CRITICAL:
                raise BrokenError(f"the checksum of its {kind.decode()} chunk is wrong")
            broken.append((place, end))
        elif kind == b"eXIf":
            exif = data[place + 8 : end - 4]
        kinds.add(kind)
        place = end
    else:
        raise BrokenError("the file is truncated")
    if b"IDAT" not in kinds:
        return None
    return Structure(width, height, _unusual_in_png(colour, depth, kinds), exif, True, tuple(broken))


def _unusual_in_png(color: int, depth: int, kinds: set[bytes]) -> tuple[str, ...]:
    """What is not a plain RGB or grey picture of 8 bits."""
    unusual = ["palette"] if color == 3 else []
    if depth == 16:
        unusual.append("16 bit")
    if b"acTL" in kinds:
        unusual.append("animated")
    elif color in (4, 6) or b"tRNS" in kinds:
        unusual.append("alpha")
    return tuple(unusual)
