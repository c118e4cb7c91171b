"""The scripts and the notebook of docs/examples run as their first lines say, on tiny data, and print what they promise."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.common import LIMIT, ROOT

EXAMPLES = ROOT / "docs" / "examples"
TINY = ("--train.max_steps", "2", "--train.precision", "fp32", "--tracking.uri", "off")


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    """A folder as `make demo` leaves it, in which the examples run one after the other."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    return folder


@pytest.fixture
def example(place):
    """`example(name, *arguments)` runs a script and gives what it prints."""

    def run(name, *arguments):
        words = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=LIMIT)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


def test_every_example_is_run_here():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(re.findall(r'example\("(\w+\.py)"', (ROOT / "tests" / "test_examples.py").read_text()))


def test_the_notebook_runs_cell_by_cell(place):
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code), "outputs are kept out of the repository"
    sources = ["".join(cell["source"]) for cell in code]
    short = sources[0].replace('"--train.epochs", "3"', ", ".join(f'"{word}"' for word in TINY))
    assert short != sources[0]
    (place / "cells.json").write_text(json.dumps([short, *sources[1:]]))
    # Each cell as a notebook runs it: by itself, in the variables of those before.
    program = (
        "import json; known = {}\nfor cell in json.load(open('cells.json')): exec(compile(cell, 'cell', 'exec'), known)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=place, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"exit (\d): [\d.]+ M multiply-adds, top-1 [\d.]+ %", result.stdout) == ["1", "2", "3"]
    assert len(re.findall(r"budget [\d.]+ M: top-1 [\d.]+ %, images per exit( [\d.]+ %,?){3}", result.stdout)) == 3
    assert re.search(r"exit 1: \d, confidence [\d.]+", result.stdout)


def test_own_network_and_its_budget_served(example, place):
    from PIL import Image

    said = example("own_network.py", *TINY)
    assert re.findall(r"exit (\d): ([\d.]+) M multiply-adds, top-1 [\d.]+ %", said) == [
        ("1", "0.11"),
        ("2", "0.41"),
        ("3", "0.70"),
    ]
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(place / f"{number}.png")
    # The network is found from the folder of the run, as the command line finds it.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)])}
    words = [sys.executable, "-m", "dist_train", "eval", "runs/own_network"]
    subprocess.run(words, cwd=place, env=environment, check=True, capture_output=True, timeout=LIMIT)
    said = example("serve_a_budget.py", "runs/own_network", "0.png", "1.png", "2.png")
    assert re.search(r"budget 0\.\d\d M multiply-adds: expected top-1 [\d.]+ %", said)
    assert re.findall(r"(\d)\.png: \d \([\d.]+\), exit [123]", said) == ["0", "1", "2"]
    assert re.search(r"0\.\d\d M multiply-adds per image instead of 0\.70 M", said)


def test_a_transformer_with_exits_learns(example):
    pytest.importorskip("transformers")
    said = example("vit_with_exits.py", 2)
    losses = [float(value) for value in re.findall(r"epoch \d: loss ([\d.]+)", said)]
    assert losses[-1] < losses[0]
    assert len(re.findall(r"exit \d: top-1 ([\d.]+) %", said)) == 3


def test_unlabeled_images_and_their_runs_in_pandas(example, place):
    pytest.importorskip("pandas")
    said = example("unlabeled_images.py", *TINY)
    assert len(re.findall(r"^(labels alone|and unlabeled images): top-1 % by exit( [\d.]+){3}$", said, re.M)) == 2
    said = example("study_in_pandas.py", "runs/unlabeled")
    assert re.search(r"labels alone +0 +2 +0\.\d", said)
    assert len((place / "runs" / "unlabeled" / "exits.csv").read_text().splitlines()) == 1 + 2 * 3
