"""How a tree of images is to be read, as the user says where it does not show, and how it was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_train.errors import DataError
from shards.source import SPLITS, Item, shown
from shards.tree import Tree, is_image

Labeled = tuple[Item, str]
"""An item and its class."""


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
                # With a slash behind each, so that cat does not begin cats.
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


def all_labeled(tree: Tree, items: Sequence[Item], classes: Mapping[str, str], file: str) -> list[Labeled]:
    """Images with the classes that ``file`` gives them; other files without an entry are left out.

    Raises:
        DataError: an image has no entry.
    """
    missing = [item for item in items if item.name not in classes and is_image(item.name)]
    if missing:
        raise DataError(
            f"{tree.root}: {len(missing)} of {len(items)} images have no entry in {file}, such as {shown(missing[0].name)}; "
            "add them, or move the images elsewhere"
        )
    return [(item, classes[item.name]) for item in items if item.name in classes]


def are_unique(names: Sequence[str]) -> bool:
    """Whether the last parts of these paths differ, so that they alone can name the classes."""
    last = [name.rpartition("/")[2] for name in names]
    return len(set(last)) == len(last)
