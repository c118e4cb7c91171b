"""What an encoded image is, and the form in which it is stored: as it comes where the decoder takes it, else as PNG."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

_STORED_AS_IS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


class Unreadable(Exception):
    """A file that is not an image, or a damaged one; the text says which."""


@dataclass(frozen=True)
class Encoded:
    """An encoded image: its bytes, the file ending of its format, its size in pixels without regard to an orientation tag."""

    data: bytes
    ext: str
    width: int
    height: int
    converted_from: str | None = None


def inspect(data: bytes) -> Encoded:
    """Find format and size, and turn formats that DALI cannot decode (GIF, AVIF, TIFF and others) into PNG (first frame, RGB).

    JPEG and PNG are read up to their headers and looked at for a missing end; other formats are decoded.

    Raises:
        Unreadable: it is not an image, or is damaged.
    """
    if not data:
        raise Unreadable("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                ext = _STORED_AS_IS.get(image.format or "")
                if ext is None:
                    return _as_png(image)
                if _is_cut(data, ext):
                    raise Unreadable("the file is truncated")
                if ext not in ("jpg", "png"):
                    image.load()
                return Encoded(data, ext, image.width, image.height)
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except Exception as error:  # a damaged file can make the codecs raise anything, and must not end hours of packing
        raise Unreadable(str(error).replace("\n", " ")) from None


def _as_png(image: Image.Image) -> Encoded:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return Encoded(file.getvalue(), "png", image.width, image.height, converted_from=image.format)


def _is_cut(data: bytes, ext: str) -> bool:
    if ext == "jpg":
        # The end of image after the last start of scan; an embedded thumbnail's end stands before it.
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    return ext == "png" and b"IEND" not in data[-1024:]
