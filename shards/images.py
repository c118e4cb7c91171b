"""What an encoded image is, and the form in which it is stored: as it comes where the decoder takes it, else re-encoded."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from shards.kinds import HEAD, kind_of
from shards.structure import PNG_SIGNATURE, BrokenError, Structure, of_jpeg, of_png

LONGEST_RATIO = 100
"""Of the longer side to the shorter one.  Beyond it an image is a line; resized, it would take gigabytes."""
MOST_PIXELS = 178_956_970
"""Pillow's limit.  A header may claim any size, and a decoder would take the memory for it."""
_STORED_AS_IS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
_ORIENTATION = 0x0112


class Unreadable(Exception):
    """A file that is not an image, or a damaged one; the text says which."""


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    With a ``max_size`` (pixels of the shorter side, at most) or a ``quality`` (of JPEG, 1 to 95) every image is decoded,
    turned upright, shrunk and stored as JPEG.  Without, images stay as they are, byte for byte, except formats that DALI
    cannot decode, and with ``unusual="convert"`` those of an unusual mode: CMYK, palette, 16 bit, alpha, animated.  These become
    PNG with 8 bits per channel, of the first frame, without alpha.
    """

    max_size: int | None = None
    quality: int | None = None
    unusual: Literal["keep", "convert"] = "keep"

    @property
    def reencodes(self) -> bool:
        """Whether every image is encoded anew."""
        return self.max_size is not None or self.quality is not None


KEEP = Encoding()


@dataclass(frozen=True)
class Encoded:
    """An encoded image: its bytes, the file ending of its format, its size in pixels without regard to an orientation tag.

    ``unusual`` names what is unusual about the source ("CMYK", "palette", "16 bit", "alpha", "animated", "orientation"),
    ``converted_from`` why the bytes are not the source's, where nobody asked for re-encoding.
    """

    data: bytes
    ext: str
    width: int
    height: int
    unusual: tuple[str, ...] = ()
    converted_from: str | None = None


def encode(data: bytes, encoding: Encoding = KEEP) -> Encoded:
    """The form in which an image is stored.

    What is stored as it comes is read up to its header and, for JPEG and PNG, looked at for a missing end.

    Raises:
        Unreadable: it is not an image, is damaged, or is of a shape that cannot be used.
    """
    if not data:
        raise Unreadable("the file is empty")
    try:
        structure = _structure(data)
        encoded = None
        if structure and structure.plain and not encoding.reencodes:
            encoded = _kept(structure, data, encoding)
        encoded = encoded or _by_decoder(structure, data, encoding)
    except BrokenError as error:
        raise Unreadable(str(error)) from None
    if encoded.width * encoded.height > MOST_PIXELS:
        raise Unreadable(f"{encoded.width} x {encoded.height} pixels; shrink it to at most {MOST_PIXELS}")
    shorter, longer = sorted((encoded.width, encoded.height))
    if longer > LONGEST_RATIO * shorter:
        raise Unreadable(
            f"{encoded.width} x {encoded.height} pixels; one side may be at most {LONGEST_RATIO} times the other"
        )
    return encoded


def as_stored(data: bytes) -> Encoded:
    """What :func:`encode` gives of a file that is trained on as it is.

    Raises:
        Unreadable: it is not an image, is damaged, or is of a kind that DALI does not decode.
    """
    image = encode(data)
    if image.converted_from:
        raise Unreadable(f"is {image.converted_from}, which training cannot decode")
    return image


def decoded_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of an image that is decoded whole, and refused where DALI refuses it.

    Pillow does not look at the checksums of a PNG's pixels, which :func:`encode` compares.

    Raises:
        Unreadable: it is not an image, is damaged anywhere, or is of a kind that DALI does not decode.
    """
    image = as_stored(data)
    with _decoders_errors(data):
        with Image.open(io.BytesIO(_readable(_structure(data), data))) as whole:
            whole.load()
    return image.width, image.height


def _structure(data: bytes) -> Structure | None:
    if data.startswith(b"\xff\xd8"):
        return of_jpeg(data)
    return of_png(data) if data.startswith(PNG_SIGNATURE) else None


def _kept(structure: Structure, data: bytes, encoding: Encoding) -> Encoded | None:
    """The image as it is, known by its structure alone; None if it has to be decoded and converted."""
    if structure.unusual and encoding.unusual == "convert":
        return None
    unusual = structure.unusual
    if structure.exif and _is_turned(structure.exif):
        unusual += ("orientation",)
    return Encoded(data, "png" if data.startswith(PNG_SIGNATURE) else "jpg", structure.width, structure.height, unusual)


def _is_turned(exif: bytes) -> bool:
    tags = Image.Exif()
    try:
        tags.load(exif)
        return bool(tags.get(_ORIENTATION, 1) != 1)
    except Exception:  # a damaged block of notes raises anything, and says nothing about the picture
        return False


def _by_decoder(structure: Structure | None, data: bytes, encoding: Encoding) -> Encoded:
    with _decoders_errors(data):
        with Image.open(io.BytesIO(_readable(structure, data))) as image:
            return _encode(image, data, encoding)


def _readable(structure: Structure | None, data: bytes) -> bytes:
    """What Pillow is shown: without broken notes, for which it would refuse the picture."""
    # From the last one on, so that the places of those before it stay true.
    for start, end in reversed(structure.broken_notes if structure else ()):
        data = data[:start] + data[end:]
    return data


@contextlib.contextmanager
def _decoders_errors(data: bytes) -> Iterator[None]:
    """Turn what Pillow raises into Unreadable; a damaged file can make it raise anything, and must not end hours of packing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Unreadable:
        raise
    except UnidentifiedImageError:
        kind = kind_of(data[:HEAD])
        raise Unreadable(
            f"{kind.name}, not an image that can be read; {kind.remedy}" if kind else "not an image"
        ) from None
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MOST_PIXELS} pixels; shrink it") from None
    except Exception as error:
        raise Unreadable(str(error).replace("\n", " ") or type(error).__name__) from None


def _encode(image: Image.Image, data: bytes, encoding: Encoding) -> Encoded:
    ext, kind = _STORED_AS_IS.get(image.format or ""), image.format
    if ext == "bmp" and not _is_plain_bmp(data):
        ext, kind = None, "16-bit or compressed BMP"
    unusual = tuple(_unusual(image, data))
    if encoding.reencodes:
        return _as_jpeg(image, encoding, unusual)
    mode = next((what for what in unusual if what != "orientation"), None)
    if ext is None or (mode and encoding.unusual == "convert"):
        file = io.BytesIO()
        picture = _eight_bits(image)
        picture.info.pop("transparency", None)  # would be saved, as the alpha that is dropped
        picture.save(file, "PNG")
        return Encoded(file.getvalue(), "png", image.width, image.height, unusual, mode if ext else kind)
    # JPEG and PNG were looked through for a missing end; of other formats only decoding shows it.
    if ext not in ("jpg", "png"):
        image.load()
    return Encoded(data, ext, image.width, image.height, unusual)


def _is_plain_bmp(data: bytes) -> bool:
    """Whether a BMP is of a kind that DALI decodes as Pillow does: not of 16 bits per pixel, and not run-length encoded."""
    core = int.from_bytes(data[14:18], "little") == 12  # the oldest header, which is shorter and knows no compression
    bits = int.from_bytes(data[24:26] if core else data[28:30], "little")
    compression = 0 if core else int.from_bytes(data[30:34], "little")
    bit_fields = 3
    return bits != 16 and compression in (0, bit_fields)


def _unusual(image: Image.Image, data: bytes) -> list[str]:
    unusual = []
    if image.mode in ("CMYK", "YCCK"):
        unusual.append("CMYK")
    if image.mode in ("P", "PA"):
        unusual.append("palette")
    # Pillow shows a PNG of three 16 bit channels as RGB; the depth stands in its header.
    if image.mode.startswith("I") or (image.format == "PNG" and data[24] == 16):
        unusual.append("16 bit")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        unusual.append("animated")  # Pillow gives all of these an alpha channel
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        unusual.append("alpha")
    if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
        unusual.append("orientation")
    return unusual


def _as_jpeg(image: Image.Image, encoding: Encoding, unusual: tuple[str, ...]) -> Encoded:
    picture = _eight_bits(ImageOps.exif_transpose(image))
    shorter = min(picture.size)
    if encoding.max_size and shorter > encoding.max_size:
        width, height = (max(1, round(side * encoding.max_size / shorter)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # An empty tag instead of the source's, which would be stored as well and turn the picture once more.
    picture.save(file, "JPEG", quality=encoding.quality or 90, exif=b"")
    return Encoded(file.getvalue(), "jpg", picture.width, picture.height, unusual)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The first frame as 8 bit grey or RGB; 16 bits are scaled, alpha is dropped, as DALI does it."""
    image.load()
    if image.mode == "F":
        raise Unreadable("floating point pixels; convert it to 8 bits first")
    if image.mode.startswith("I"):
        import numpy as np

        # 65535 / 257 is 255.
        levels: Any = np.asarray(image).astype(np.float64) / 257
        grey = Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8))
        return grey.convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")
