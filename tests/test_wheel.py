"""The wheel stands alone: installed into an empty environment, docs/own-images.md can be followed in an empty folder."""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.common import LIMIT, ROOT
from tests.documents import blocks, split

SOURCES = ("dist_train", "launch", "shards", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """`dist-train` of an environment that has the wheel and, by a path, the libraries of this one; none of this repository."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "sources").mkdir()
    for path in (ROOT / name for name in SOURCES):
        if path.is_dir():
            shutil.copytree(
                path, folder / "sources" / path.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(path, folder / "sources")
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "sources"]
    subprocess.run([*pip, *build], check=True, timeout=LIMIT)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    # Before the path to the other libraries is there, among which pip would find this repository's own.
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(folder / "sources")
    return python.with_name("dist-train")


def photos(folder):
    """Class folders of photos that a small network can tell apart, of a size at which it is the one of the page."""
    random = np.random.default_rng(0)
    for label, color in (("cat", (200, 60, 60)), ("dog", (60, 60, 200))):
        (folder / label).mkdir(parents=True)
        for number in range(40):
            pixels = np.clip(random.normal(color, 40, (40, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.jpg")
    return folder


@pytest.fixture
def run(program, tmp_path):
    """`run(*words)`: a command of the environment, in an empty folder; its exit code and all that it says."""
    unset = ("PYTHONPATH", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in unset}

    def run(*words):
        words = [program.with_name(words[0]), *words[1:]]
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT)
        return result.returncode, result.stdout + result.stderr

    return run


def test_nothing_of_the_repository_is_needed_or_hidden(run, program, tmp_path):
    # A folder called launch, as a user may have one, hides nothing.
    (tmp_path / "launch").mkdir()
    ask = "import dist_train, launch, shards; print(dist_train.__file__, launch.__file__, shards.__file__)"
    code, said = run("python", "-c", ask)
    assert code == 0, said
    found = [Path(file) for file in said.split()]
    assert all(file.is_relative_to(program.parent.parent) for file in found)
    assert (found[0].parent / "py.typed").exists()
    for kind in ("digits", "cifar10", "imagenet"):
        assert f"{kind}.yaml is written" in run("dist-train", "init", kind)[1]
    assert "properties" in run("dist-train", "schema")[1]


def expanded(words, folder):
    """The words of a command line as a shell passes them on: patterns are the files that they match."""
    return [file for word in words for file in sorted(glob.glob(word, root_dir=folder)) or [word]]


def test_the_page_leads_from_photos_to_an_exported_network(run, tmp_path):
    photos(tmp_path / "PHOTOS")
    said = {}
    for block in blocks("docs/own-images.md"):
        if block.test == "wheel":
            for words in block.commands:
                # Shorter than a reader's training, and at the precision that every machine computes fast.
                trains = words[1:2] in (["plan"], ["launch"])
                short = ["--train.max_steps", "3", "--train.precision", "fp32"] if trains else []
                code, text = run(*expanded(words, tmp_path), *short)
                assert code == 0, f"{words}: {text}"
                said[words[1]] = text
        elif block.test == "refused":
            lines = block.text.splitlines()
            for command, line in zip(lines[::2], lines[1::2]):
                code, text = run(*split(command.removeprefix("$ ")))
                assert code == 2, f"{command}: {text}"
                assert re.fullmatch(re.escape(line).replace("…", ".*"), text.strip()), f"{command}: {text}"
    # The table of the plan is the one that the page shows.
    (shown,) = (block.text for block in blocks("docs/own-images.md") if "parameters" in block.text)
    assert shown in said["plan"]
    assert "40 images, 2 classes" in said["plan"]
    assert "top-5" not in said["launch"]  # of two classes
    runs = tmp_path / "runs"
    assert len(json.loads((runs / "photos" / "report.json").read_text())["exits"]) == 4
    assert (runs / "photos" / "report.html").exists()
    assert len((tmp_path / "classes.csv").read_text().splitlines()) == 81
    assert "80 images; left at exit" in said["predict"]
    assert (tmp_path / "comparison" / "comparison.html").exists()
    assert (runs / "photos" / "export" / "policy.json").exists()
