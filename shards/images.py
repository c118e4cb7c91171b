"""What an encoded image is, and the form in which it is stored: as it comes where the decoder takes it, else re-encoded."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageOps, UnidentifiedImageError

_STORED_AS_IS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
_ORIENTATION = 0x0112


class Unreadable(Exception):
    """A file that is not an image, or a damaged one; the text says which."""


@dataclass(frozen=True)
class Storing:
    """How images are stored.

    With a ``max_size`` (pixels of the shorter side, at most) or a ``quality`` (of JPEG, 1 to 95) every image is decoded,
    turned upright, shrunk and stored as JPEG.  Without, images stay as they are, byte for byte, except formats that DALI
    cannot decode, and with ``odd="convert"`` those of an odd mode: CMYK, palette, 16 bit, alpha, animated.  These become
    PNG with 8 bits per channel, of the first frame, without alpha.
    """

    max_size: int | None = None
    quality: int | None = None
    odd: Literal["keep", "convert"] = "keep"

    @property
    def reencodes(self) -> bool:
        """Whether every image is encoded anew."""
        return self.max_size is not None or self.quality is not None


AS_IS = Storing()


@dataclass(frozen=True)
class Encoded:
    """An encoded image: its bytes, the file ending of its format, its size in pixels without regard to an orientation tag.

    ``odd`` names what is unusual about the source ("CMYK", "palette", "16 bit", "alpha", "animated", "orientation"),
    ``converted_from`` why the bytes are not the source's, where nobody asked for re-encoding.
    """

    data: bytes
    ext: str
    width: int
    height: int
    odd: tuple[str, ...] = ()
    converted_from: str | None = None


def encode(data: bytes, storing: Storing = AS_IS) -> Encoded:
    """The form in which an image is stored.

    What is stored as it comes is read up to its header and, for JPEG and PNG, looked at for a missing end.

    Raises:
        Unreadable: it is not an image, or is damaged.
    """
    if not data:
        raise Unreadable("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return _encode(image, data, storing)
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except Exception as error:  # a damaged file can make the codecs raise anything, and must not end hours of packing
        raise Unreadable(str(error).replace("\n", " ") or type(error).__name__) from None


def decoded_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of an image that is decoded whole.

    Raises:
        Unreadable: it is not an image, or is damaged anywhere.
    """
    image = encode(data)  # finds a missing end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as whole:
                whole.load()
        except Exception as error:
            raise Unreadable(str(error).replace("\n", " ") or type(error).__name__) from None
    return image.width, image.height


def _encode(image: Image.Image, data: bytes, storing: Storing) -> Encoded:
    ext = _STORED_AS_IS.get(image.format or "")
    if ext and _is_cut(data, ext):
        raise Unreadable("the file is truncated")
    odd = tuple(_odd(image, data))
    if storing.reencodes:
        return _as_jpeg(image, storing, odd)
    mode = next((what for what in odd if what != "orientation"), None)
    if ext is None or (mode and storing.odd == "convert"):
        file = io.BytesIO()
        _eight_bits(image).save(file, "PNG")
        return Encoded(file.getvalue(), "png", image.width, image.height, odd, mode if ext else image.format)
    if ext not in ("jpg", "png"):
        image.load()
    return Encoded(data, ext, image.width, image.height, odd)


def _odd(image: Image.Image, data: bytes) -> list[str]:
    odd = []
    if image.mode in ("CMYK", "YCCK"):
        odd.append("CMYK")
    if image.mode in ("P", "PA"):
        odd.append("palette")
    # Pillow shows a PNG of three 16 bit channels as RGB; the depth stands in its header.
    if image.mode.startswith("I") or (image.format == "PNG" and data[24] == 16):
        odd.append("16 bit")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        odd.append("animated")  # Pillow gives all of these an alpha channel
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        odd.append("alpha")
    if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
        odd.append("orientation")
    return odd


def _as_jpeg(image: Image.Image, storing: Storing, odd: tuple[str, ...]) -> Encoded:
    picture = _eight_bits(ImageOps.exif_transpose(image))
    shorter = min(picture.size)
    if storing.max_size and shorter > storing.max_size:
        width, height = (max(1, round(side * storing.max_size / shorter)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # An empty tag instead of the source's, which would be stored as well and turn the picture once more.
    picture.save(file, "JPEG", quality=storing.quality or 90, exif=b"")
    return Encoded(file.getvalue(), "jpg", picture.width, picture.height, odd)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The first frame as 8 bit grey or RGB; 16 bits are scaled, alpha is dropped, as DALI does it."""
    image.load()
    if image.mode == "F":
        raise Unreadable("floating point pixels; convert it to 8 bits first")
    if image.mode.startswith("I"):
        import numpy as np

        levels: Any = np.asarray(image).astype(np.float64) / 257
        grey = Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8))
        return grey.convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _is_cut(data: bytes, ext: str) -> bool:
    if ext == "jpg":
        # The end of image after the last start of scan; an embedded thumbnail's end stands before it.
        return not data.endswith(b"\xff\xd9") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    return ext == "png" and b"IEND" not in data[-1024:]
