"""Trees as people have them: the classes and images that come out, or the one line that says what is in the way."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_train.errors import DataError
from shards import sources
from shards.__main__ import main
from shards.index import Index
from shards.layout import split_of
from shards.make import Sample, make_samples
from tests.common import refusal

Files = Mapping[str, "bytes | str | None"]


@cache
def picture(name: str) -> bytes:
    """A small JPEG that is another one for every name."""
    seed = zlib.crc32(name.encode(errors="surrogateescape"))
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def lay(root: Path, files: Files) -> None:
    """Write a tree; None stands for the picture of that name, and a name with a slash at its end for a folder."""
    for name, content in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        data = picture(name) if content is None else content
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def pictures(*patterns: str) -> dict[str, None]:
    """Names with ``{a,b}`` spelled out."""
    found = list(patterns)
    while any("{" in name for name in found):
        found = [
            name.replace(match[0], word, 1) if match else name
            for name in found
            for match in [re.search(r"\{(.*?)\}", name)]
            for word in (match[1].split(",") if match else [""])
        ]
    return dict.fromkeys(found)


def stored(out: Path) -> dict[str, dict[bytes, str]]:
    """By split the class of every image, by the image's bytes."""
    found: dict[str, dict[bytes, str]] = {}
    for path in sorted(out.glob("*/index.json")):
        index = Index.load(path.parent)
        tars = [(path.parent / shard.name).read_bytes() for shard in index.shards]
        rows = zip(index.shard, index.offset, index.size, index.label)
        found[path.parent.name] = {tars[s][o : o + n]: index.classes[label] for s, o, n, label in rows}
    return found


def expected(names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[bytes, str]]:
    return {
        split: {picture(name): label for name, label in sorted(labels.items())}
        for split, labels in names.items()
        if labels
    }


def by_folder(files: Files, **splits: str) -> dict[str, dict[str, str]]:
    """By split the files below a folder, with the class that the pattern's group finds in their names."""
    return {
        split: {name: match[1] for name in files if (match := re.fullmatch(pattern, name))}
        for split, pattern in splits.items()
    }


TINY = {
    **pictures("train/n0{1,2}/images/n_{0,1,2}.JPEG", "val/images/val_{0,1,2}.JPEG", "test/images/test_{0,1}.JPEG"),
    "train/n01/n01_boxes.txt": "n_0.JPEG\t0\t0\t62\t62\n", "train/n02/n02_boxes.txt": "n_0.JPEG\t0\t0\t62\t62\n",
    "val/val_annotations.txt": "val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\nval_2.JPEG\tn02\t0\t0\t1\t1\n",
    "wnids.txt": "n01\nn02\n", "words.txt": "n01\ta\n",
}  # fmt: skip
TINY_RESULT = {
    **by_folder(TINY, train=r"train/(n0\d)/images/.*"),
    "val": {"val/images/val_0.JPEG": "n02", "val/images/val_1.JPEG": "n01", "val/images/val_2.JPEG": "n02"},
}
PLACES = {
    **pictures("data_256/a/airfield/0000000{1,2}.jpg", "data_256/b/booth/indoor/0000000{1,2}.jpg", "val_256/Places365_val_0000000{1,2}.jpg"),
    "categories_places365.txt": "/a/airfield 0\n/b/booth/indoor 1\n",
    "places365_val.txt": "Places365_val_00000001.jpg 1\nPlaces365_val_00000002.jpg 0\n",
    "places365_train_standard.txt": "/a/airfield/00000001.jpg 0\n",
}  # fmt: skip
PLACES_RESULT = {
    "train": by_folder(PLACES, a=r"data_256/a/(airfield)/.*")["a"] | by_folder(PLACES, b=r"data_256/b/(booth/indoor)/.*")["b"],
    "val": {"val_256/Places365_val_00000001.jpg": "booth/indoor", "val_256/Places365_val_00000002.jpg": "airfield"},
}  # fmt: skip
SPECIES = pictures("{Aves,Plantae}/{1,2}{3,4}/{a,b}.jpg")
SPECIES = {name.replace("Plantae/", "Plantae/9"): None for name in SPECIES}
INATURALIST = {f"train_val2018/{name}": content for name, content in SPECIES.items()}


def coco(names: list[str]) -> str:
    labels = {name: name.split("/")[-2] for name in names}
    numbers = {label: n for n, label in enumerate(sorted(set(labels.values())))}
    return json.dumps({
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "category_id": numbers[labels[name]]} for n, name in enumerate(names)],
        "categories": [{"id": n, "name": label} for label, n in numbers.items()],
    })  # fmt: skip


PLAIN = pictures("{cat,dog}/{1,2}.jpg")
TORCHVISION = pictures("{train,val}/{cat,dog}/{1,2}.jpg")
VALID = pictures("train/{cat,dog}/{1,2}.jpg", "valid/{cat,dog}/3.jpg", "test/{cat,dog}/4.jpg")
CASES: dict[str, tuple[Files, list[str], Mapping[str, Mapping[str, str]]]] = {
    "class folders": (PLAIN, [], by_folder(PLAIN, train=r"(\w+)/.*")),
    "below another folder": ({f"photos/2024/{name}": None for name in PLAIN}, [],
                             by_folder({f"photos/2024/{name}": None for name in PLAIN}, train=r"photos/2024/(\w+)/.*")),
    "torchvision": (TORCHVISION, [], by_folder(TORCHVISION, train=r"train/(\w+)/.*", val=r"val/(\w+)/.*")),
    "tiny-imagenet": (TINY, [], TINY_RESULT),
    "tiny-imagenet in its folder": ({f"tiny-imagenet-200/{name}": picture(name) if content is None else content for name, content in TINY.items()}, [], TINY_RESULT),
    "images in a folder of each class": (pictures("train/{a,b}/images/{1,2}.jpg"), [],
                                         by_folder(pictures("train/{a,b}/images/{1,2}.jpg"), train=r"train/(\w)/.*")),
    "Places365": (PLACES, [], PLACES_RESULT),
    "iNaturalist": (INATURALIST, [], by_folder(INATURALIST, train=r".*/(\d+)/.*")),
    "iNaturalist with its lists": (
        INATURALIST | {"train2018.json": coco([name for name in INATURALIST if "a.jpg" in name]),
                       "val2018.json": coco([name for name in INATURALIST if "b.jpg" in name])}, [],
        by_folder(INATURALIST, train=r".*/(\d+)/a.jpg", val=r".*/(\d+)/b.jpg")),
    "valid and --split-name": (VALID, ["--split-name", "train=train", "--split-name", "val=valid", "--split", "test=test"],
                               by_folder(VALID, train=r"train/(\w+)/.*", val=r"valid/(\w+)/.*", test=r"test/(\w+)/.*")),
    "train in parts": (pictures("train.X{1,2}/{a,b}{1,2}/1.jpg"), ["--split", "train=train.X1", "--split", "train=train.X2"],
                       by_folder(pictures("train.X{1,2}/{a,b}{1,2}/1.jpg"), train=r"train.X\d/(\w\d)/.*")),
    "super-categories": (pictures("{a,b}/{x,y}{1,2}/1.jpg", "a/z/1.jpg"), ["--depth", "2"],
                         by_folder(pictures("{a,b}/{x,y}{1,2}/1.jpg", "a/z/1.jpg"), train=r"(.*)/1.jpg") ),
    "super-categories of other names": (pictures("a/{x,y}/1.jpg", "b/{v,w}/1.jpg"), ["--depth", "2"],
                                        by_folder(pictures("a/{x,y}/1.jpg", "b/{v,w}/1.jpg"), train=r"./(.)/1.jpg")),
    "merged": (pictures("{a,b}/{x,y}/1.jpg"), ["--depth", "1"], by_folder(pictures("{a,b}/{x,y}/1.jpg"), train=r"(.)/./1.jpg")),
    "Kaggle's flat folders": (pictures("train/{1,2,3}.png", "test/{4,5}.png") | {"trainLabels.csv": "id,label\n1,frog\n2,cat\n3,frog\n"},
                              ["--labels", "{in}/trainLabels.csv"],
                              {"train": {"train/1.png": "frog", "train/2.png": "cat", "train/3.png": "frog"}}),
    "columns by their names": (pictures("img/{1,2}.jpg") | {"l.csv": "path,width,species\nimg/1.jpg,8,owl\n./img/2.jpg,8,tit\n"},
                               ["--labels", "{in}/l.csv"], {"train": {"img/1.jpg": "owl", "img/2.jpg": "tit"}}),
    "a text": (pictures("img/a {1,2}.jpg") | {"l.txt": "img/a 1.jpg owl\nimg/a 2.jpg tit\n"},
               ["--labels", "{in}/l.txt"], {"train": {"img/a 1.jpg": "owl", "img/a 2.jpg": "tit"}}),
    "JSON": (pictures("img/{1,2}.jpg") | {"l.json": json.dumps({"1.jpg": "owl", "2.jpg": 3})},
             ["--labels", "{in}/l.json"], {"train": {"img/1.jpg": "owl", "img/2.jpg": "3"}}),
    "splits and labels": (pictures("{train,val}/{1,2}.jpg") | {"l.tsv": "".join(f"{s}/{n}.jpg\tc{n}\n" for s in ("train", "val") for n in (1, 2))},
                          ["--labels", "{in}/l.tsv"], by_folder(pictures("{train,val}/{1,2}.jpg"), train=r"train/(.).jpg", val=r"val/(.).jpg")),
    "thumbnails of file servers": (PLAIN | pictures("@eaDir/1.jpg", "cat/@eaDir/1.jpg", "dog/Thumbs.db", "#recycle/x/1.jpg", "cat/.@__thumb/1.jpg"), [],
                                   by_folder(PLAIN, train=r"(\w+)/.*")),
    "a class that is called train": (pictures("{bus,car,train}/{1,2}.jpg"), ["--depth", "1"],
                                     by_folder(pictures("{bus,car,train}/{1,2}.jpg"), train=r"(\w+)/.*")),
    "a class only in val": (pictures("train/{a,b}/1.jpg", "val/{b,c}/1.jpg"), ["--extra-classes"],
                            by_folder(pictures("train/{a,b}/1.jpg", "val/{b,c}/1.jpg"), train=r"train/(.)/.*", val=r"val/(.)/.*")),
}  # fmt: skip
CASES["super-categories"] = (
    *CASES["super-categories"][:2],
    {"train": {n: n.removesuffix("/1.jpg") for n in CASES["super-categories"][0]}},
)


def laid(tmp_path: Path, case: str) -> tuple[list[str], Path]:
    files, options, _ = CASES[case]
    lay(tmp_path / "in", files)
    return [word.replace("{in}", str(tmp_path / "in")) for word in options], tmp_path / "in"


def wanted(case: str) -> dict[str, dict[bytes, str]]:
    names = CASES[case][2]
    if case == "splits and labels":
        names = {split: {name: f"c{label}" for name, label in part.items()} for split, part in names.items()}
    if case == "tiny-imagenet in its folder":
        names = TINY_RESULT
    return expected(names)


@pytest.mark.parametrize("case", CASES)
def test_a_layout_gives_its_classes(case: str, tmp_path: Path) -> None:
    options, source = laid(tmp_path, case)
    assert main(["make", "folder", str(source), str(tmp_path / "out"), *options]) == 0
    assert stored(tmp_path / "out") == wanted(case)


@pytest.mark.parametrize("case", CASES)
def test_a_tar_is_read_as_its_folder_is(case: str, tmp_path: Path) -> None:
    options, source = laid(tmp_path, case)
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(source, "././")
    assert main(["make", "folder", str(tmp_path / "in.tar"), str(tmp_path / "out"), *options]) == 0
    assert stored(tmp_path / "out") == wanted(case)


REFUSED: dict[str, tuple[Files, list[str], str]] = {
    "Training and Testing": (pictures("{Training,Testing}/{a,b}/1.jpg"), [],
        "{in}: its folder 'Testing' is called like a split; give --split test=Testing --split train=Training, or --depth 1 if it is a class "
        "(seen: Testing/ (a/, b/), Training/ (a/, b/))"),
    "valid": (VALID, [],
        "{in}: its folder 'valid' is called like a split; give --split train=train --split test=test --split val=valid, or --depth 1 if it is a class "
        "(seen: test/ (cat/, dog/), train/ (cat/, dog/), valid/ (cat/, dog/))"),
    "train.X1": (pictures("train.X{1,2}/{a,b}/1.jpg", "val.X/{a,b}/1.jpg"), [],
        "{in}: its folder 'train.X1' is called like a split; give --split train=train.X1 --split train=train.X2 --split val=val.X, "
        "or --depth 1 if it is a class (seen: train.X1/ (a/, b/), train.X2/ (a/, b/), val.X/ (a/, b/))"),
    "super-categories": (pictures("{a,b}/{x,y}/1.jpg"), [],
        "{in}: its folder 'a' holds only folders (x/, y/); give --depth 2 if these are classes, --depth 1 if 'a' is one "
        "(seen: a/ (x/ (1.jpg), y/ (1.jpg)), b/ (x/ (1.jpg), y/ (1.jpg)))"),
    "classes first": (pictures("{a,b}/{train,val}/1.jpg"), [],
        "{in}: its folder 'a' holds only folders (train/, val/); give --depth 2 if these are classes, --depth 1 if 'a' is one "
        "(seen: a/ (train/ (1.jpg), val/ (1.jpg)), b/ (train/ (1.jpg), val/ (1.jpg)))"),
    "a class that is called train": (pictures("{bus,car,train}/{1,2}.jpg"), [],
        "{in}: holds train and also 'bus'; beside the splits train, val, test there must be no other folder; give --split train=train "
        "to read only these, or --depth 1 if all are classes"),
    "a folder for two splits": (PLAIN, ["--split", "train=cat", "--split", "val=cat"],
        "--split val=cat: cat is given already, or lies in cat; give every folder once"),
    "a class only in val": (pictures("train/{a,b}/1.jpg", "val/{b,c,d}/1.jpg"), [],
        "{in}: val has the class 'c' and 1 more classes, which train lacks (seen: train/ (a/, b/), val/ (b/, c/, d/)); repair the folders, or give --extra-classes"),
    "images beside classes": (PLAIN | pictures("{8,9}.jpg"), [],
        "{in}: holds 8.jpg and 1 more files beside its folders; move what belongs to a class into its folder and the rest elsewhere, or give --labels FILE"),
    "images beside classes of a split": (TORCHVISION | pictures("val/9.jpg"), [],
        "{in}/val: holds 9.jpg beside its folders; move what belongs to a class into its folder and the rest elsewhere, or give --labels FILE"),
    "a class that is still a tar": ({**pictures("train/n0000000{1,2}/1.jpg"), "train/n00000003.tar": "x"}, [],
        "{in}/train: holds n00000003.tar beside its folders; move what belongs to a class into its folder and the rest elsewhere, or give --labels FILE"),
    "a flat folder": (pictures("{1,2,3}.jpg"), [],
        "{in}: has no class folders; images must lie in one folder per class, or give --labels FILE with the classes of its 3 images"),
    "a split that is not there": (PLAIN, ["--split", "val=vald"], "--split val=vald: there is no such folder in {in}; it holds cat/, dog/"),
    "a split of another name": (PLAIN, ["--split", "extra=dog"], "--split extra=dog: give NAME=FOLDER, where NAME is one of train, val, test"),
    "labels of images that are not there": (pictures("i/{1,2}.jpg") | {"l.csv": "1.jpg,a\n2.jpg,b\n3.jpg,c\n4.jpg,c\n"}, ["--labels", "{in}/l.csv"],
        "{in}/l.csv: names 3.jpg and 1 more, of which there is no image; remove the entries or fetch the images"),
    "images without a label": (pictures("i/{1,2}.jpg") | {"l.csv": "1.jpg,a\n"}, ["--labels", "{in}/l.csv"],
        "{in}: 1 of 2 images have no entry in {in}/l.csv, such as i/2.jpg; add them, or move the images elsewhere"),
    "two labels": (pictures("i/1.jpg") | {"l.csv": "1.jpg,a\n1.jpg,b\n"}, ["--labels", "{in}/l.csv"],
        "{in}/l.csv: gives 1.jpg the classes 'a' and 'b'; leave one of them out"),
    "a name that two images have": (pictures("{i,j}/1.jpg") | {"l.csv": "1.jpg,a\n"}, ["--labels", "{in}/l.csv"],
        "{in}/l.csv: names 1.jpg, which several images are called; give their paths"),
    "a label file of one column": (pictures("i/1.jpg") | {"l.csv": "1.jpg\n"}, ["--labels", "{in}/l.csv"],
        "{in}/l.csv: its first line (1.jpg) has one column; give an image and its class on every line"),
    "columns that say nothing": (pictures("i/1.jpg") | {"l.csv": "a,b,c\n1.jpg,2,3\n"}, ["--labels", "{in}/l.csv"],
        "{in}/l.csv: which of its columns (a, b, c) has the image is not clear; call it 'image'"),
    "an image as labels": (pictures("i/1.jpg"), ["--labels", "{in}/i/1.jpg"],
        "{in}/i/1.jpg: is no text; give lines of an image and its class, as CSV or divided by spaces"),
    "tiny-imagenet with a missing entry": (TINY | {"val/val_annotations.txt": "val_0.JPEG\tn02\t0\nval_1.JPEG\tn01\t0\n"}, [],
        "{in}: 1 of 3 images have no entry in val/val_annotations.txt, such as val/images/val_2.JPEG; add them, or move the images elsewhere"),
    "Places365 without its labels": ({name: content for name, content in PLACES.items() if name != "places365_val.txt"}, [],
        "{in}: the classes of the images in val are in places365_val.txt, which is not there; put it beside them"),
    "ImageNet's archives": ({"ILSVRC2012_img_val.tar": "x"}, [], "{in}: is ImageNet; use `python -m shards make imagenet, with --val-labels`"),
    "CIFAR's batches": ({"data_batch_1": "x", "test_batch": "x"}, [], "{in}: is CIFAR-10; use `python -m shards make cifar10`"),
    "Parquet": ({"train-0.parquet": "PAR1"}, [], "{in}: holds Parquet files, no images; use `python -m shards make parquet {in}`"),
    "a WebDataset": ({"train-0.tar": "x"}, [], "{in}: holds tars of a WebDataset, no images; use `python -m shards index {in}`"),
    "an empty class": (PLAIN | {"owl/": ""}, [], "{in}/owl: is empty; put images of the class there or remove the folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_meant_in_several_ways_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, options, line = REFUSED[case]
    lay(tmp_path / "in", files)
    words = [word.replace("{in}", str(tmp_path / "in")) for word in options]
    said = refusal(capsys, "make", "folder", tmp_path / "in", tmp_path / "out", *words)
    assert said == f"shards: {line.replace('{in}', str(tmp_path / 'in'))}\n"
    assert not (tmp_path / "out").exists()


def test_names_of_splits_in_any_spelling() -> None:
    spelled = {
        "train": ["train", "Training", "TRAIN", "train.X1", "train_set", "trainset", "train-images", "train2017", "trainval"],
        "val": ["val", "valid", "Validation", "dev", "val.X", "val2017", "val_256", "valset"],
        "test": ["test", "Testing", "test_images", "test1"],
        None: ["cat", "trainer", "train station", "test tube", "valley", "developer", "n01440764", "0", "steam train", "tests of time"],
    }  # fmt: skip
    for split, names in spelled.items():
        assert {name: split_of(name) for name in names} == dict.fromkeys(names, split)


def test_kaggles_imagenet_is_read_as_such(tmp_path: Path) -> None:
    top = "ILSVRC/Data/CLS-LOC"
    files = pictures(
        f"{top}/train/n0000000{{1,2}}/{{1,2}}.JPEG",
        f"{top}/val/ILSVRC2012_val_0000000{{1,2}}.JPEG",
        f"{top}/test/1.JPEG",
    )
    rows = "ImageId,PredictionString\nILSVRC2012_val_00000002,n00000001 1 2 3 4\nILSVRC2012_val_00000001,n00000002 1 2 3 4\n"
    lay(tmp_path / "in", files | {"LOC_val_solution.csv": rows, f"{top}/val/notes.txt": "no image"})
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert stored(tmp_path / "out") == expected({
        **by_folder(files, train=rf"{top}/train/(\w+)/.*"),
        "val": {f"{top}/val/ILSVRC2012_val_0000000{n}.JPEG": f"n0000000{3 - n}" for n in (1, 2)},
    })  # fmt: skip


def test_imagenet_that_is_half_sorted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path / "in", pictures("train/n0000000{1,2}/1.JPEG", "val/n00000001/1.JPEG", "val/2.JPEG"))
    command = ("make", "imagenet", tmp_path / "in", tmp_path / "out")
    assert refusal(capsys, *command) == (
        f"shards: {tmp_path}/in/val: holds class folders and also 1 images that are not in any, such as 2.JPEG; "
        "finish sorting them, or put all images back into one folder\n"
    )
    (tmp_path / "in/val/2.JPEG").unlink()
    (tmp_path / "labels.txt").write_text("n00000001\n")
    assert refusal(capsys, *command, "--val-labels", tmp_path / "labels.txt") == (
        f"shards: --val-labels {tmp_path}/labels.txt is given, but the images in {tmp_path}/in/val lie in class folders, which say "
        "the classes; leave --val-labels out, or put all images into one folder\n"
    )
    assert main([str(word) for word in command]) == 0


def test_links_are_followed(tmp_path: Path) -> None:
    lay(tmp_path / "elsewhere", pictures("owls/{1,2}.jpg", "more/3.jpg"))
    lay(tmp_path / "in", PLAIN)
    os.symlink(tmp_path / "elsewhere/owls", tmp_path / "in/owl")
    os.symlink(tmp_path / "elsewhere/more", tmp_path / "in/cat/more")
    os.symlink(tmp_path / "elsewhere/more/3.jpg", tmp_path / "in/dog/3.jpg")
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    index = Index.load(tmp_path / "out" / "train")
    assert dict(zip(index.classes, np.bincount(index.label).tolist())) == {"cat": 3, "dog": 3, "owl": 2}


def test_links_that_lead_nowhere_or_in_a_circle_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path / "in", PLAIN)
    link, command = tmp_path / "in" / "owl", ("make", "folder", tmp_path / "in", tmp_path / "out")
    for target, why in (
        (tmp_path / "gone", f"is a link to {tmp_path}/gone, which cannot be followed (No such file or directory); restore what it leads to, or remove it"),
        (link, f"is a link to {link}, which cannot be followed (Too many levels of symbolic links); restore what it leads to, or remove it"),
        (tmp_path / "in", "is a link to a folder that it lies in; remove the link"),
    ):  # fmt: skip
        os.symlink(target, link)
        assert refusal(capsys, *command) == f"shards: {link}: {why}\n"
        link.unlink()


def test_pipes_and_names_of_any_bytes_do_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path / "in", PLAIN)
    os.mkfifo(tmp_path / "in/cat/pipe.jpg")
    strange = os.fsdecode(b"caf\xe9 \n.jpg")
    (tmp_path / "in/cat" / strange).write_bytes(picture("strange"))
    (tmp_path / "in/dog" / os.fsdecode(b"\xff.jpg")).write_bytes(b"no image")
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert len(Index.load(tmp_path / "out/train")) == 5
    assert (
        "2 skipped, see manifest.json (cat/pipe.jpg: a link, a pipe or a device, not a file; ...)"
        in capsys.readouterr().out
    )
    (tmp_path / "in" / os.fsdecode(b"caf\xe9")).mkdir()
    (tmp_path / "in" / os.fsdecode(b"caf\xe9") / "1.jpg").write_bytes(picture("x"))
    assert refusal(capsys, "make", "folder", tmp_path / "in", tmp_path / "again") == (
        "shards: the class 'caf\\xe9': its name is not UTF-8; rename it, for instance with convmv\n"
    )
    os.mkfifo(tmp_path / "in.tar")
    with open(tmp_path / "in/cat/video.jpg", "wb") as file:
        file.truncate(3_000_000_000)
    shutil.rmtree(tmp_path / "in" / os.fsdecode(b"caf\xe9"))
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "again")]) == 0
    assert "video.jpg: 3000000000 bytes, more than an image can have" in (
        tmp_path / "again/train/manifest.json"
    ).read_text().replace('",\n   "', ": ")
    for file in ("/dev/zero", tmp_path / "in/cat/pipe.jpg"):
        line = refusal(capsys, "make", "folder", tmp_path / "in", tmp_path / "other", "--labels", file)
        assert line == f"shards: {file}: cannot be read (a link, a pipe or a device, not a file)\n"
    for kind in ("folder", "cifar10"):
        line = refusal(capsys, "make", kind, tmp_path / "in.tar", tmp_path / "other")
        assert line == f"shards: {tmp_path}/in.tar: is neither a folder nor a file\n"


def test_an_output_in_the_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path / "in", PLAIN)
    os.symlink(tmp_path / "in", tmp_path / "link")
    for out in (tmp_path / "in", tmp_path / "in/shards", tmp_path / "link/deep/shards"):
        assert refusal(capsys, "make", "folder", tmp_path / "in", out) == (
            f"shards: {out}: lies in {tmp_path}/in, whose images are to be packed; choose a folder outside of it\n"
        )


@pytest.mark.parametrize(
    ("head", "line"),
    [
        (b"PK\x03\x04", "is a zip archive, not a tar; unpack it with unzip and give the folder"),
        (b"\x28\xb5\x2f\xfd", "is compressed with zstd, not a tar; uncompress it with zstd -d"),
        (b"PAR1", "is a Parquet file, not a tar; use `python -m shards make parquet`"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive, not a tar; unpack it with 7z x and give the folder"),
    ],
)
def test_other_archives_are_named(head: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.tar").write_bytes(head + bytes(5000))
    for kind in ("folder", "cifar10"):
        assert (
            refusal(capsys, "make", kind, tmp_path / "in.tar", tmp_path / "out")
            == f"shards: {tmp_path}/in.tar: {line}\n"
        )


def test_tars_with_names_and_files_of_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(*names: str, kind: bytes = tarfile.REGTYPE) -> None:
        with tarfile.open(tmp_path / "in.tar", "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size, info.type = len(picture(name)), kind
                tar.addfile(info, io.BytesIO(picture(name)))

    command = ("make", "folder", tmp_path / "in.tar", tmp_path / "out")
    write("cat/1.jpg", "../dog/1.jpg")
    assert refusal(capsys, *command) == (
        f"shards: {tmp_path}/in.tar: holds ../dog/1.jpg, which lies outside of the archive; pack it again from within its folder\n"
    )
    write("././cat/1.jpg", ".//dog/1.jpg", "./owl/./1.jpg", "/tit/1.jpg")
    assert main([str(word) for word in command]) == 0
    assert Index.load(tmp_path / "out/train").classes == ("cat", "dog", "owl", "tit")
    sparse = tmp_path / "sparse.jpg"
    with open(sparse, "wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "in.tar", "-C", tmp_path, "sparse.jpg"], check=True)
    assert refusal(capsys, *command) == (
        f"shards: {tmp_path}/in.tar: holds sparse.jpg as a sparse file; pack it again without --sparse\n"
    )


@pytest.mark.parametrize(
    ("sample", "line"),
    [
        (Sample("x", "a", [1, 2]), "sample x: its image is a list; give the bytes of an encoded image, a PIL image, or uint8 [H, W] or [H, W, 3]"),
        (Sample("x", "a", np.zeros((4, 4))), "sample x: its image is an array float64 [4, 4]; give uint8 [H, W] or [H, W, 3]"),
        (Sample("x", "a", np.zeros((3, 4, 4), np.uint8)), "sample x: its image is an array uint8 [3, 4, 4]; give uint8 [H, W] or [H, W, 3]"),
        (Sample("x", 3, b"x"), "sample x: its label is a int; give the class's name, or None without one"),  # type: ignore[arg-type]
        (Sample(7, "a", b"x"), "sample 7: its name is a int; give a text"),  # type: ignore[arg-type]
        (Sample("x", "a", b"x", "valid"), "sample x: its split is 'valid'; allowed are train, val, test"),
        ("x", "a sample is a str; give Sample(name, label, image, split)"),
    ],
)  # fmt: skip
def test_a_sample_of_a_wrong_type_is_refused_when_it_comes(sample: Sample, line: str, tmp_path: Path) -> None:
    later = []

    def given():  # type: ignore[no-untyped-def]
        yield sample
        later.append(1)

    with pytest.raises(DataError) as error:
        make_samples(given(), tmp_path / "out")
    assert (str(error.value), later) == (line, [])
    assert not (tmp_path / "out").exists()


def test_val_per_class_of_a_class_with_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path / "in", PLAIN | pictures("owl/1.jpg"))
    said = refusal(capsys, "make", "folder", tmp_path / "in", tmp_path / "out", "--val-per-class", 1)
    assert (
        said
        == "shards: --val-per-class is 1, but class 'owl' has 1 image; it needs at least 2, add images or leave the class out\n"
    )


def test_a_folder_of_shards_is_no_folder_of_images(tmp_path: Path) -> None:
    lay(tmp_path / "in", PLAIN)
    assert main(["make", "folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    with pytest.raises(DataError, match=r"is shards already; use `python -m shards info`"):
        sources.folder(tmp_path / "out" / "train")
