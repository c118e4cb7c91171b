"""What lies in a folder or in a tar of one: folders within folders, with their files."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_train.errors import DataError
from shards import archives
from shards.index import UNLABELED
from shards.source import Item, read_file, shown

NO_FILE = -1
"""Offset of what is no file: a pipe, a device, a link in a tar."""
IMAGE_ENDINGS = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
    ".heic",
    ".jp2",
}
# Folders that file servers and systems put into any folder, with thumbnails or what was deleted.
_SYSTEM = {"@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found", "__macosx"}
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}


@dataclass
class Folder:
    """A folder: those in it by their names, and its files, named by their paths from the top."""

    folders: dict[str, Folder] = field(default_factory=dict)
    files: list[Item] = field(default_factory=list)

    def at(self, path: str) -> Folder | None:
        """The folder at a path below this one, if it is there."""
        found: Folder | None = self
        for part in filter(None, path.split("/")):
            found = found.folders.get(part) if found else None
        return found

    def all_files(self) -> Iterator[Item]:
        """The files here and below."""
        waiting = [self]
        while waiting:
            folder = waiting.pop()
            yield from folder.files
            waiting += folder.folders.values()

    def images(self) -> list[Item]:
        """Files here, not below, whose names end like an image's."""
        return [item for item in self.files if is_image(item.name)]

    def sketch(self, depth: int = 3) -> str:
        """What is here, on one line: ``train/ (cat/ (9 files), dog/ (8 files)), val/ (...), 2 files``."""
        parts = []
        for name in list(self.folders)[:3]:
            inside = f" ({self.folders[name].sketch(depth - 1)})" if depth > 1 else ""
            parts.append(f"{shown(name)}/{inside}")
        if len(self.folders) > 3:
            parts.append(f"{len(self.folders) - 3} more folders")
        if len(self.files) == 1:
            parts.append(shown(self.files[0].name.rpartition("/")[2]))
        elif self.files:
            parts.append(f"{len(self.files)} files")
        return ", ".join(parts) or "empty"


@dataclass(frozen=True)
class Tree:
    """A folder or tar that was looked through.

    ``root`` is what the items' names are paths in, for reading and for messages; ``version`` is another text when the
    contents are others.
    """

    root: Path
    version: str
    top: Folder

    def content(self, item: Item) -> bytes:
        """The bytes of a file; raises DataError if it cannot be read."""
        try:
            return read_file(self.root, item)
        except OSError as error:
            raise DataError(f"{self.root / item.name}: cannot be read ({error.strerror or error})") from None


def look(root: Path, scratch: Path | None = None) -> Tree:
    """Look through a folder, or a tar of one, which if compressed is uncompressed to ``scratch`` first.

    Hidden files and those of file servers and systems are left out.  Links are followed.  A folder that all the others
    lie in is taken off the names.

    Raises:
        DataError: nothing is there, a link that leads nowhere or in a circle, or a damaged tar.
    """
    if not root.exists():
        raise DataError(
            f"{root}: no such folder; give a folder of class folders, or of train/ val/ test/ with class folders"
        )
    try:
        tree = _walk(root) if root.is_dir() else _list(root, scratch)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return tree


def without_outer(tree: Tree, keep: frozenset[str]) -> Tree:
    """The tree from the first folder on that has anything beside it; one that is named in ``keep`` is not taken off."""
    outer, top = "", tree.top
    while len(top.folders) == 1 and not top.images():
        ((name, inner),) = top.folders.items()
        lists = any(item.name.endswith((".json", ".csv")) for item in top.files)  # what they say is needed
        if name in keep or not inner.folders or lists:
            break
        outer, top = f"{outer}{name}/", inner
    if not outer:
        return tree
    for folder in _below(top):
        folder.files = [item._replace(name=item.name.removeprefix(outer)) for item in folder.files]
    return replace(tree, root=tree.root / outer, top=top)


def refuse_inside(source: Path, out: Path) -> None:
    """Refuse an output folder within the source, where the shards would be taken for a class the next time.

    Raises:
        DataError: it is so.
    """
    inner, outer = out.resolve(), source.resolve()
    if outer.is_dir() and (inner == outer or outer in inner.parents):
        raise DataError(f"{out}: lies in {source}, whose images are to be packed; choose a folder outside of it")


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's."""
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS


def _below(folder: Folder) -> Iterator[Folder]:
    waiting = [folder]
    while waiting:
        found = waiting.pop()
        yield found
        waiting += found.folders.values()


def _walk(root: Path) -> Tree:
    digest, top = hashlib.sha256(), Folder()
    waiting = [(top, str(root), "", frozenset([_identity(os.stat(root))]))]
    while waiting:
        folder, path, prefix, above = waiting.pop()
        with os.scandir(path) as entries:
            found = sorted((entry for entry in entries if _visible(entry.name)), key=lambda entry: entry.name)
        for entry in found:
            state = _state(entry)
            if stat.S_ISDIR(state.st_mode):
                # By device and inode: two paths with links in them can be one folder.
                if _identity(state) in above:
                    raise DataError(f"{shown(entry.path)}: is a link to a folder that it lies in; remove the link")
                folder.folders[entry.name] = inner = Folder()
                waiting.append((inner, entry.path, f"{prefix}{entry.name}/", above | {_identity(state)}))
            else:
                location = None if stat.S_ISREG(state.st_mode) else (entry.path, NO_FILE)
                folder.files.append(Item(prefix + entry.name, UNLABELED, state.st_size, location))
                # Names and sizes are in the plan already; a file that was replaced by one of the same size shows by its time.
                digest.update(b"%d\n" % state.st_mtime_ns)
    return Tree(root, digest.hexdigest(), top)


def _state(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError as error:
        if not entry.is_symlink():
            raise
        target = os.readlink(entry.path)
        raise DataError(
            f"{shown(entry.path)}: is a link to {shown(target)}, which cannot be followed ({error.strerror}); "
            "restore what it leads to, or remove it"
        ) from None


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def _list(path: Path, scratch: Path | None) -> Tree:
    """The same of a tar; of two members of the same name the later one counts."""
    tar, top = archives.unpacked(path, scratch), Folder()
    items: dict[str, Item] = {}
    for member in archives.members(tar):
        parts = member.name.split("/")
        # As in a folder, where what lies in a hidden folder is hidden as well.
        if not member.name or not all(map(_visible, parts)):
            continue
        if member.is_folder:
            _make_folder(top, parts)
        elif member.same_as in items:
            items[member.name] = items[member.same_as]._replace(name=member.name)
        else:
            items[member.name] = Item(member.name, UNLABELED, member.size, (str(tar), member.offset))
    for name, item in sorted(items.items()):
        _make_folder(top, name.split("/")[:-1]).files.append(item)
    # A tar has its members in any order; in a folder they are sorted.
    for folder in list(_below(top)):
        folder.folders = dict(sorted(folder.folders.items()))
    return Tree(path, archives.version(path), top)


def _make_folder(top: Folder, parts: list[str]) -> Folder:
    for part in parts:
        top = top.folders.setdefault(part, Folder())
    return top


def _visible(name: str) -> bool:
    folded = name.lower()
    return not name.startswith(".") and folded not in _SYSTEM and folded not in _SYSTEM_FILES
