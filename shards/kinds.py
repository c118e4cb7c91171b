"""What a file is by its first bytes, where it is neither an image that can be stored nor a tar."""

from __future__ import annotations

from typing import NamedTuple

HEAD = 64
"""First bytes that tell."""


class Kind(NamedTuple):
    """A kind of file: its name with an article, and what to do with one."""

    name: str
    remedy: str


_IMAGES_TO_CONVERT = "convert it to JPEG or PNG"
_MAGIC = (
    (b"PK\x03\x04", Kind("a zip archive", "unpack it with unzip and give the folder")),
    (b"\x28\xb5\x2f\xfd", Kind("compressed with zstd", "uncompress it with zstd -d")),
    (b"\x04\x22\x4d\x18", Kind("compressed with lz4", "uncompress it with lz4 -d")),
    (b"\x1f\x9d", Kind("compressed with compress", "uncompress it with uncompress")),
    (b"\x1f\x8b", Kind("compressed with gzip", "uncompress it with gzip -d")),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", "unpack it with 7z x and give the folder")),
    (b"Rar!", Kind("a RAR archive", "unpack it with unrar x and give the folder")),
    (b"PAR1", Kind("a Parquet file", "use `python -m shards make parquet`")),
    (b"ARROW1", Kind("an Arrow file", "save it as Parquet and use `python -m shards make parquet`")),
    (b"\x89HDF", Kind("an HDF5 file", "write its images to class folders")),
    (b"SQLite format 3", Kind("an SQLite database", "write its images to class folders")),
    (b"version https://git-lfs", Kind("a Git LFS pointer", "fetch the file itself with git lfs pull")),
    (b"\xff\x0a", Kind("a JPEG XL image", _IMAGES_TO_CONVERT)),
    (b"\0\0\0\x0cJXL ", Kind("a JPEG XL image", _IMAGES_TO_CONVERT)),
    (b"%PDF", Kind("a PDF document", "extract its images with pdfimages")),
    (b"<svg", Kind("an SVG drawing", "render it as PNG")),
    (b"<?xml", Kind("an XML file", "if it is a drawing, render it as PNG")),
    (b"<!doctype html", Kind("an HTML page", "fetch it again")),
    (b"<html", Kind("an HTML page", "fetch it again")),
)
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def kind_of(head: bytes) -> Kind | None:
    """The kind of a file that begins with ``head``, or None if it is not known."""
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIC:
            return Kind("a HEIC photo", "convert it to JPEG, for instance with heif-convert or sips")
        if head[8:12] in (b"avif", b"avis"):
            return Kind("an AVIF image", _IMAGES_TO_CONVERT)
        return Kind("a video", "extract its frames with ffmpeg")
    # Pages and drawings are text, in any case and perhaps behind spaces.
    text = head.lstrip().lower()
    return next((kind for magic, kind in _MAGIC if head.startswith(magic) or text.startswith(magic)), None)
