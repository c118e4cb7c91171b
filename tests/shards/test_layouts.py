"""Trees as people have them: the classes and images that come out, or the one line that says what is in the way."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from shards.__main__ import main
from tests.common import refusal
from tests.shards.trees import Files, lay, picture, pictures, stored


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


def test_val_per_class_of_a_class_with_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path / "in", PLAIN | pictures("owl/1.jpg"))
    said = refusal(capsys, "make", "folder", tmp_path / "in", tmp_path / "out", "--val-per-class", 1)
    assert (
        said
        == "shards: --val-per-class is 1, but class 'owl' has 1 image; it needs at least 2, add images or leave the class out\n"
    )


def test_folders_beside_the_splits_that_labels_do_not_read_are_said(tmp_path, capsys):
    lay(
        tmp_path / "in", pictures("{train,valid,extra}/1.jpg") | {"l.csv": "train/1.jpg,owl\n", "notes/readme.txt": "x"}
    )
    words = ["make", "folder", str(tmp_path / "in"), str(tmp_path / "out"), "--labels", str(tmp_path / "in/l.csv")]
    assert main(words) == 0
    assert "left out: extra (no split), valid (no split)" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["target", "label", "path"])
def test_a_first_image_whose_class_is_called_like_a_column_is_no_header(label, tmp_path):
    lay(tmp_path / "in", pictures("i/{1,2}.jpg") | {"l.csv": f"1.jpg,{label}\n2.jpg,dog\n"})
    words = ["make", "folder", str(tmp_path / "in"), str(tmp_path / "out"), "--labels", str(tmp_path / "in/l.csv")]
    assert main(words) == 0
    assert stored(tmp_path / "out") == expected({"train": {"i/1.jpg": label, "i/2.jpg": "dog"}})
