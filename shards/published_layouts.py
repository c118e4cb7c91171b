"""Data sets that are published in a layout of their own: Tiny ImageNet, Places365 and iNaturalist."""

from __future__ import annotations

import re

from dist_train.errors import DataError
from shards import labels
from shards.reading import Labeled, Layout, all_labeled, are_unique
from shards.source import shown
from shards.tree import Tree

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


def published_layout(tree: Tree) -> Layout | None:
    """The layout of a tree that is one of these data sets, as it comes out of its archives.

    Raises:
        DataError: it is one of them, but damaged or incomplete.
    """
    return _tiny_imagenet(tree) or _places(tree) or _inaturalist(tree)


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
            # Beside the images of every class lies a list of their boxes.
            if not item.name.endswith("_boxes.txt")
        ],
        "val": all_labeled(tree, images, classes, notes[0].name),
    }
    left = [f"{name} (no classes)" for name in tree.top.folders if name not in splits]
    return Layout("tiny-imagenet", splits, left)


def _places(tree: Tree) -> Layout | None:
    """Places365 as published: data_*/a/airfield/..., val_*/ and places365_val.txt, classes in categories_places365.txt."""
    files = {item.name.rpartition("/")[2]: item for item in tree.top.all_files() if item.name.endswith(".txt")}
    data = [folder for name, folder in tree.top.folders.items() if name.startswith(("data_256", "data_large"))]
    # The classes lie in folders by their first letters.
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
    # `/a/airfield 0`: the letter is no part of the name.
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
        splits["val"] = all_labeled(tree, images, named, file)
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
    unique = are_unique(list(species))
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
