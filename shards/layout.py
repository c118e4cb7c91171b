"""Recognises how a tree of images is laid out: which of its folders are splits and which are classes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_train.errors import DataError
from shards import labels
from shards.source import SPLITS, Item, read_path, shown
from shards.tree import Folder, Tree, is_image

Labeled = tuple[Item, str]
"""An item and its class."""

_SPELLINGS = {
    "train": ("train", "training", "trn", "tr"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF = {word: split for split, words in _SPELLINGS.items() for word in words}
# What a folder's name may have beside such a word and still be a split's: train.X1, test_set, val2017, train-images.
_BESIDE = re.compile(r"set|images?|imgs?|data|dataset|split|folder|x?\d*|large|small|standard")
_SUPER_CATEGORIES = {
    "Actinopterygii",
    "Amphibia",
    "Animalia",
    "Arachnida",
    "Aves",
    "Bacteria",
    "Chromista",
    "Fungi",
    "Insecta",
    "Mammalia",
    "Mollusca",
    "Plantae",
    "Protozoa",
    "Reptilia",
}


@dataclass(frozen=True)
class Reading:
    """How a tree is to be read where it does not show.

    Args:
        depth: levels below the top, or below a split, at which the class folders lie.
        splits: the folders of every split.
        labels: a file with the classes of the images.
        extra_classes: whether val and test may have classes that train lacks.
    """

    depth: int | None = None
    splits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labels: Path | None = None
    extra_classes: bool = False

    @classmethod
    def of_options(cls, depth: int | None, splits: Sequence[str], labels_file: Path | None, extra: bool) -> Reading:
        """From the command line, where ``splits`` are texts of the form NAME=FOLDER.

        Raises:
            DataError: one of them has another form.
        """
        folders: dict[str, list[str]] = {}
        for text in splits:
            name, equals, folder = text.partition("=")
            if not equals or name not in SPLITS or not folder.strip("/"):
                raise DataError(f"--split {text}: give NAME=FOLDER, where NAME is one of {', '.join(SPLITS)}")
            folder = folder.strip("/")
            for other in (path for paths in folders.values() for path in paths):
                if f"{folder}/".startswith(f"{other}/") or f"{other}/".startswith(f"{folder}/"):
                    raise DataError(
                        f"--split {text}: {folder} is given already, or lies in {other}; give every folder once"
                    )
            folders.setdefault(name, []).append(folder)
        return cls(depth, folders, labels_file, extra)


AS_IT_SHOWS = Reading()


@dataclass(frozen=True)
class Layout:
    """A tree that was understood: its name, its images by split with their classes, and what was left out."""

    name: str
    splits: Mapping[str, list[Labeled]]
    left_out: Sequence[str] = ()

    def __str__(self) -> str:
        """One line for the user."""
        parts = [
            f"{split} {len(items)} files of {len({label for _, label in items})} classes"
            for split, items in self.splits.items()
        ]
        left = f"; left out: {', '.join(map(shown, self.left_out))}" if self.left_out else ""
        return f"read as {self.name}: {', '.join(parts)}{left}"


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
        layout = _tiny_imagenet(tree) or _places(tree) or _inaturalist(tree) or _class_folders(tree, reading)
    if not reading.extra_classes:
        _refuse_extra_classes(tree, layout)
    return layout


def split_of(name: str) -> str | None:
    """The split that a folder's name stands for in any spelling, if it does."""
    words = _words(name)
    named = [word for word in words if word in _SPLIT_OF]
    if len(named) == 1 and all(word in _SPLIT_OF or _BESIDE.fullmatch(word) for word in words):
        return _SPLIT_OF[named[0]]
    return None


def split_words(name: str) -> str | None:
    """The split that a name has a word for, whatever else it has: train for ``imagenet1k-train-0000``."""
    named = {_SPLIT_OF[word] for word in _words(name) if word in _SPLIT_OF}
    return named.pop() if len(named) == 1 else None


def _words(name: str) -> list[str]:
    words = re.split(r"[\W_]+|(?<=[a-z])(?=\d)", name.lower().replace("trainval", "train"))
    return [word.removesuffix("set") if word.removesuffix("set") in _SPLIT_OF else word for word in words if word]


def _tiny_imagenet(tree: Tree) -> Layout | None:
    """train/CLASS/images and val/images with val_annotations.txt; the test images' classes were never published."""
    val, train = tree.top.at("val"), tree.top.at("train")
    notes = [item for item in val.files if item.name.endswith("val_annotations.txt")] if val else []
    if not val or not train or not notes:
        return None
    rows = [line.split("\t") for line in tree.content(notes[0]).decode(errors="replace").splitlines() if line]
    if any(len(row) < 2 for row in rows):
        raise DataError(f"{tree.root / notes[0].name}: is damaged; fetch it again")
    images = [item for item in val.all_files() if item not in notes]
    classes = labels.assign(str(tree.root / notes[0].name), [labels.Entry(row[0], row[1]) for row in rows], images)
    splits = {
        "train": [
            (item, name)
            for name, folder in train.folders.items()
            for item in folder.all_files()
            if not item.name.endswith("_boxes.txt")
        ],
        "val": _all_labeled(tree, images, classes, notes[0].name),
    }
    left = [f"{name} (no classes)" for name in tree.top.folders if name not in splits]
    return Layout("tiny-imagenet", splits, left)


def _places(tree: Tree) -> Layout | None:
    """Places365 as published: data_*/a/airfield/..., val_*/ and places365_val.txt, classes in categories_places365.txt."""
    files = {item.name.rpartition("/")[2]: item for item in tree.top.all_files() if item.name.endswith(".txt")}
    data = [folder for name, folder in tree.top.folders.items() if name.startswith(("data_256", "data_large"))]
    if not data or not all(len(name) == 1 for name in data[0].folders):
        return None
    if "categories_places365.txt" not in files:
        raise DataError(
            f"{tree.root}: is Places365 without categories_places365.txt; put it there, it comes with the labels"
        )
    rows = [
        line.rsplit(None, 1)
        for line in tree.content(files["categories_places365.txt"]).decode().splitlines()
        if line.strip()
    ]
    paths = {path.strip("/"): path.strip("/").partition("/")[2] for path, _ in rows}
    by_number = {number: path.strip("/").partition("/")[2] for path, number in rows}
    train: list[Labeled] = []
    for path, name in paths.items():
        folder = data[0].at(path)
        train += [(item, name) for item in folder.files] if folder else []
    strange = {item.name for item in data[0].all_files()} - {item.name for item, _ in train}
    if strange:
        raise DataError(
            f"{tree.root}: {shown(min(strange))} lies in no folder of categories_places365.txt; fetch it again"
        )
    splits = {"train": train}
    val = [folder for name, folder in tree.top.folders.items() if name.startswith(("val_256", "val_large"))]
    if val:
        if "places365_val.txt" not in files:
            raise DataError(
                f"{tree.root}: the classes of the images in val are in places365_val.txt, which is not there; put it beside them"
            )
        file = files["places365_val.txt"].name
        images = list(val[0].all_files())
        entries = labels.parse(file, tree.content(files["places365_val.txt"]))
        wrong = next((entry for entry in entries if entry.label not in by_number), None)
        if wrong:
            raise DataError(
                f"{file}: gives {wrong.image} the number {wrong.label}, which categories_places365.txt has not"
            )
        classes = labels.assign(file, entries, images)
        named = {image: by_number[number] for image, number in classes.items()}
        splits["val"] = _all_labeled(tree, images, named, file)
    used = [*data[:1], *val[:1]]
    return Layout(
        "Places365",
        splits,
        [name for name, folder in tree.top.folders.items() if not any(folder is one for one in used)],
    )


def _inaturalist(tree: Tree) -> Layout | None:
    """Super-categories such as Aves/ with a folder per species in each; splits by train2018.json and val2018.json, if there."""
    holder, depth = tree.top, 1
    if len(holder.folders) == 1:
        (holder,), depth = holder.folders.values(), 2
    if not holder.folders or not set(holder.folders) <= _SUPER_CATEGORIES or holder.images():
        return None
    species = {
        f"{category}/{name}": folder
        for category, inner in holder.folders.items()
        for name, folder in inner.folders.items()
    }
    if not species:  # Fungi/ and Bacteria/ with images in them are classes like any other
        return None
    mixed = any(inner.images() for inner in holder.folders.values())
    if mixed or any(folder.folders for folder in species.values()):
        what = "images beside the folders of species" if mixed else "folders in the folders of species"
        raise DataError(
            f"{tree.root}: looks like iNaturalist, but holds {what}; give --depth {depth} if {', '.join(holder.folders)} "
            f"are the classes, --depth {depth + 1} if the folders in them are (seen: {holder.sketch()})"
        )
    unique = _are_unique(list(species))
    labeled = [
        (item, path.rpartition("/")[2] if unique else path) for path, folder in species.items() for item in folder.files
    ]
    items = [item for item, _ in labeled]
    files = {
        split: [item for item in tree.top.files if re.fullmatch(rf"{split}\d{{4}}(_mini)?\.json", item.name)]
        for split in ("train", "val")
    }
    if not any(files.values()):
        return Layout("iNaturalist", {"train": labeled})
    splits = {}
    for split, found in files.items():
        if found:
            entries = labels.parse(found[0].name, tree.content(found[0]))
            named = labels.assign(found[0].name, entries, items)
            splits[split] = [(item, named[item.name]) for item in items if item.name in named]
    known = {item.name for part in splits.values() for item, _ in part}
    left = [f"{len(items) - len(known)} images that neither names"] if len(known) < len(items) else []
    return Layout(f"iNaturalist, by {' and '.join(found[0].name for found in files.values() if found)}", splits, left)


def _class_folders(tree: Tree, reading: Reading) -> Layout:
    """A folder per class, at the top or in the folders of splits."""
    places, left_out = _split_folders(tree, reading)
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
    unique = all(_are_unique([name for name, _ in pairs]) for pairs in found.values())
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
    if not places:
        named: dict[str, list[Folder | None]] = {
            split: [tree.top.folders[split]] for split in SPLITS if split in tree.top.folders
        }
        places = named or {"train": [tree.top]}
    images = {
        split: [item for folder in folders if folder for item in folder.all_files() if is_image(item.name)]
        for split, folders in places.items()
    }
    everything = [item for part in images.values() for item in part]
    entries = labels.parse(str(path), data)
    classes = labels.assign(str(path), entries, everything)
    splits, left = {}, []
    for split, part in images.items():
        if not any(item.name in classes for item in part):
            left.append(f"{split} (no classes)")
            continue
        splits[split] = _all_labeled(tree, part, classes, str(path))
    return Layout(f"labels of {path.name}", splits, left)


def _all_labeled(tree: Tree, items: Sequence[Item], classes: Mapping[str, str], file: str) -> list[Labeled]:
    missing = [item for item in items if item.name not in classes and is_image(item.name)]
    if missing:
        raise DataError(
            f"{tree.root}: {len(missing)} of {len(items)} images have no entry in {file}, such as {shown(missing[0].name)}; "
            "add them, or move the images elsewhere"
        )
    return [(item, classes[item.name]) for item in items if item.name in classes]


def _at_depth(folder: Folder, depth: int, path: str) -> Iterator[tuple[str, Folder]]:
    for name, inner in folder.folders.items():
        inside = f"{path}/{name}" if path else name
        if depth == 1:
            yield inside, inner
        else:
            yield from _at_depth(inner, depth - 1, inside)


def _are_unique(names: Sequence[str]) -> bool:
    last = [name.rpartition("/")[2] for name in names]
    return len(set(last)) == len(last)


def _flat_hint(folder: Folder) -> str:
    return f", or give --labels FILE with the classes of its {len(folder.images())} images" if folder.images() else ""
