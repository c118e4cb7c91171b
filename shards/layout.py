"""Recognises how a tree of images is laid out: which of its folders are splits and which are classes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_train.errors import DataError
from shards import labels
from shards.published_layouts import published_layout
from shards.reading import Labeled, Layout, Reading, all_labeled, are_unique
from shards.source import SPLITS, read_path, shown
from shards.split_names import split_of
from shards.tree import Folder, Tree, is_image


def understand(tree: Tree, reading: Reading) -> Layout:
    """Find the splits and classes of a tree.

    Raises:
        DataError: it can be meant in more than one way, or in none; the text says what was seen and which option helps.
    """
    if reading.labels:
        layout = _by_file(tree, reading, reading.labels)
    elif reading.splits or reading.depth:
        layout = _class_folders(tree, reading)
    else:
        layout = published_layout(tree) or _class_folders(tree, reading)
    if not reading.extra_classes:
        _refuse_extra_classes(tree, layout)
    return layout


def _class_folders(tree: Tree, reading: Reading) -> Layout:
    """A folder per class, at the top or in the folders of splits."""
    places, left_out = _split_folders(tree, reading)
    # At the top, unless it holds the classes itself: then the loop below looks at it.
    _refuse_stray_images(tree, tree.top if "" not in places else None, "")
    depth = reading.depth or 1
    found = {path: list(_at_depth(folder, depth, "")) for path, (_, folder) in places.items()}
    for path, (_, folder) in places.items():
        where = tree.root / path
        if not found[path]:
            raise DataError(
                f"{where}: has no class folders; images must lie in one folder per class{_flat_hint(folder)}"
            )
        for level in range(depth):
            for name, holder in [("", folder)] if level == 0 else _at_depth(folder, level, ""):
                _refuse_stray_images(tree, holder, "/".join(filter(None, (path, name))))
        empty = next((name for name, inner in found[path] if not any(inner.all_files())), None)
        if empty is not None:
            raise DataError(f"{where / empty}: is empty; put images of the class there or remove the folder")
    if reading.depth is None:
        _refuse_deeper_classes(tree, [pair for pairs in found.values() for pair in pairs])
    # The innermost folder's name is the class, unless two would share it, as in cats/other and dogs/other.
    unique = all(are_unique([name for name, _ in pairs]) for pairs in found.values())
    splits: dict[str, list[Labeled]] = {}
    for path, (split, _) in places.items():
        for name, folder in found[path]:
            label = name.rpartition("/")[2] if unique else name
            splits.setdefault(split, []).extend((item, label) for item in folder.all_files())
    return Layout("class folders", splits, left_out)


def _split_folders(tree: Tree, reading: Reading) -> tuple[dict[str, tuple[str, Folder]], list[str]]:
    """By its path, each folder that holds class folders, with its split; and the folders that are left out."""
    top = tree.top
    if reading.splits:
        places = {}
        for split, paths in reading.splits.items():
            for path in paths:
                folder = top.at(path)
                if folder is None:
                    raise DataError(
                        f"--split {split}={path}: there is no such folder in {tree.root}; it holds {top.sketch(1)}"
                    )
                places[path] = (split, folder)
        used = {path.partition("/")[0] for path in places}
        return places, [f"{name}/" for name in top.folders if name not in used]
    splits = [name for name in SPLITS if name in top.folders]
    others = [name for name in top.folders if name not in SPLITS]
    if reading.depth is None:
        _refuse_spellings(tree, splits)
    if splits and others and reading.depth is not None:
        return {"": ("train", top)}, []  # then they are classes that are called like a split
    if splits and others:
        words = " ".join(f"--split {name}={name}" for name in splits)
        raise DataError(
            f"{tree.root}: holds {', '.join(splits)} and also '{shown(others[0])}'; beside the splits {', '.join(SPLITS)} "
            f"there must be no other folder; give {words} to read only these, or --depth 1 if all are classes"
        )
    if not splits:
        return {"": ("train", top)}, []
    return {name: (name, top.folders[name]) for name in splits}, []


def _refuse_spellings(tree: Tree, splits: Sequence[str]) -> None:
    """Refuse folders that are called like splits in another spelling."""
    named = [(split_of(name), name) for name in tree.top.folders if name not in SPLITS]
    likely = [(split, name) for split, name in named if split]
    if not likely:
        return
    words = " ".join(f"--split {split}={shown(name)}" for split, name in [*((name, name) for name in splits), *likely])
    raise DataError(
        f"{tree.root}: its folder '{shown(likely[0][1])}' is called like a split; give {words}, or --depth 1 if it is a class "
        f"(seen: {tree.top.sketch(2)})"
    )


def _refuse_deeper_classes(tree: Tree, classes: Sequence[tuple[str, Folder]]) -> None:
    """Refuse class folders that hold only folders, which may be the classes themselves.

    Where every class has a single one, and they are all called the same (``images``), nothing else can be meant.
    """
    # Beside the folders there may be a README or a list; images would make it a class with more of them below.
    hollow = [(name, folder) for name, folder in classes if folder.folders and not folder.images()]
    inner = {name for _, folder in hollow for name in folder.folders}
    if not hollow or (len(inner) == 1 and len(hollow) == len(classes) > 1 and not any(map(split_of, inner))):
        return
    name, folder = hollow[0]
    raise DataError(
        f"{tree.root}: its folder '{shown(name)}' holds only folders ({folder.sketch(1)}); give --depth 2 if these are classes, "
        f"--depth 1 if '{shown(name.rpartition('/')[2])}' is one (seen: {tree.top.sketch(3)})"
    )


def _refuse_stray_images(tree: Tree, folder: Folder | None, path: str) -> None:
    """Refuse images, and archives of classes, beside class folders: they would be left out."""
    if folder is None or not folder.folders:
        return
    stray = folder.images() or [item for item in folder.files if re.search(r"n\d{8}\.tar$", item.name)]
    if stray:
        more = f" and {len(stray) - 1} more files" if len(stray) > 1 else ""
        raise DataError(
            f"{tree.root / path}: holds {shown(stray[0].name.rpartition('/')[2])}{more} beside its folders; "
            "move what belongs to a class into its folder and the rest elsewhere, or give --labels FILE"
        )


def _refuse_extra_classes(tree: Tree, layout: Layout) -> None:
    """Refuse classes that train lacks: no network could learn them."""
    if "train" not in layout.splits:
        return
    known = {label for _, label in layout.splits["train"]}
    for split, items in layout.splits.items():
        extra = sorted({label for _, label in items} - known)
        if extra:
            more = f" and {len(extra) - 1} more classes" if len(extra) > 1 else ""
            raise DataError(
                f"{tree.root}: {split} has the class '{shown(extra[0])}'{more}, which train lacks (seen: {tree.top.sketch(2)}); "
                "repair the folders, or give --extra-classes"
            )


def _by_file(tree: Tree, reading: Reading, path: Path) -> Layout:
    """Images wherever they lie, with their classes from a file."""
    try:
        data = read_path(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if reading.depth:
        raise DataError(
            "--depth and --labels are both given; with --labels the folders do not count, leave --depth out"
        )
    places = {split: [tree.top.at(name) for name in names] for split, names in reading.splits.items()}
    for split, folders in places.items():
        if None in folders:
            raise DataError(
                f"--split {split}={reading.splits[split][folders.index(None)]}: there is no such folder in {tree.root}"
            )
    left = []
    if not places:
        named: dict[str, list[Folder | None]] = {
            split: [tree.top.folders[split]] for split in SPLITS if split in tree.top.folders
        }
        places = named or {"train": [tree.top]}
        others = [(name, folder) for name, folder in tree.top.folders.items() if named and name not in named]
        left += [
            f"{name} (no split)" for name, folder in others if any(is_image(item.name) for item in folder.all_files())
        ]
    images = {
        split: [item for folder in folders if folder for item in folder.all_files() if is_image(item.name)]
        for split, folders in places.items()
    }
    everything = [item for part in images.values() for item in part]
    entries = labels.parse(str(path), data)
    classes = labels.assign(str(path), entries, everything)
    splits = {}
    for split, part in images.items():
        if not any(item.name in classes for item in part):
            left.append(f"{split} (no classes)")
            continue
        splits[split] = all_labeled(tree, part, classes, str(path))
    return Layout(f"labels of {path.name}", splits, left)


def _at_depth(folder: Folder, depth: int, path: str) -> Iterator[tuple[str, Folder]]:
    for name, inner in folder.folders.items():
        inside = f"{path}/{name}" if path else name
        if depth == 1:
            yield inside, inner
        else:
            yield from _at_depth(inner, depth - 1, inside)


def _flat_hint(folder: Folder) -> str:
    return f", or give --labels FILE with the classes of its {len(folder.images())} images" if folder.images() else ""
