"""`dist-train compare` from the outside: what it writes, from folders as from MLflow, and what it says to bad input."""

import base64
import io
import json
import re
import shutil
import sqlite3
import subprocess

import pytest
from PIL import Image

from dist_train import cli
from dist_train.compare.files import markdown
from dist_train.compare.grouping import compare
from dist_train.compare.runs import read_folder, read_store
from dist_train.config_file import dump_config, load_config
from dist_train.tracking.mlflow import create_parent
from dist_train.tracking.tracker import Tracker
from tests.common import LIMIT

FILES = [
    "accuracy.csv",
    "accuracy.png",
    "claims.csv",
    "comparison.html",
    "comparison.md",
    "comparison.txt",
    "first_exit.png",
    "gains.png",
    "runs.csv",
    "training.png",
]


@pytest.fixture
def compare_command(tmp_path, monkeypatch, capsys):
    """`compare_command(*arguments)` in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        status = cli.run(["compare", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def track(folder):
    """Ship a run folder to the MLflow store beside it, as its trainer would have."""
    config = load_config(folder / "config.yaml")
    tags = {"command": "dist-train train x.yaml", "classes": "10"}
    Tracker(config, tags).close("FINISHED")
    return f"sqlite:///{config.runs / 'mlflow.db'}"


def test_the_page_is_whole_without_a_network(make_run, compare_command, tmp_path):
    first = make_run("a", [0.5, 0.6], loss__teachers="none", data={"classes": "10"})
    make_run("b", [0.6, 0.7], loss__teachers="last")
    status, out, _ = compare_command(first, first.parent / "b", "--out", "two", "--title", "a & <b>")
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == FILES
    assert "+10.00" in out
    page = (tmp_path / "two" / "comparison.html").read_text()
    assert "<h1>a &amp; &lt;b&gt;</h1>" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 4
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()


def test_folders_and_mlflow_give_the_same_comparison(make_run, compare_command):
    lines = [
        (step, step, {"speed/images_per_second": 90.0 + step, "train/loss": 1 / step, "val/mean_top1": 0.5})
        for step in (10, 20, 30)
    ]
    folders = [
        make_run(
            f"{teachers}{seed}",
            [0.5 + 0.01 * seed, 0.6],
            seed=seed,
            lines=lines,
            data={"classes": "10"},
            loss__teachers=teachers,
        )
        for teachers in ("none", "later")
        for seed in (0, 1)
    ]
    uri = [track(folder) for folder in folders][-1]
    # After a kill, a run goes on from its checkpoint at step 10 and logs the steps 20 and 30 again, here with other losses.
    # Their speeds are the same here: MLflow keeps the first of what is of the machine.
    metrics = folders[0] / "metrics.jsonl"
    again = metrics.read_text().splitlines()
    metrics.write_text(again[0] + "\n")
    tracker = Tracker(load_config(folders[0] / "config.yaml"), {"command": "again"})
    metrics.write_text(
        "\n".join(
            [again[0], *(line.replace('"t": ', '"t": 9').replace('loss": 0.0', 'loss": 0.9') for line in again[1:])]
        )
        + "\n"
    )
    tracker.close("FINISHED")

    from_folders = compare([read_folder(folder) for folder in folders])
    from_store = compare(read_store(uri, "dist_train", ""))
    assert markdown(from_store) == markdown(from_folders)
    for one, two in zip(from_folders.groups, from_store.groups):
        for mine, other in zip(one.runs, two.runs):
            assert (mine.fields, mine.series, mine.report) == (other.fields, other.series, other.report)
    assert from_folders.groups[0].runs[0].series["train/loss"][1] == (20, 0.95)

    for _ in range(2):
        status, out, err = compare_command(
            "--uri", uri, "--experiment", "dist_train", "--filter", "params.loss.teachers = 'later'"
        )
        assert (status, err) == (0, "")
    assert "later" not in markdown(compare(read_store(uri, "dist_train", "params.loss.teachers = 'none'")))
    assert f"in MLflow {uri}" in out
    # The comparison is a run of its own, with its files, and no run of the next comparison.
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("dist_train").experiment_id
    made = client.search_runs([experiment], "tags.`dist_train.comparison` LIKE '%/comparison'")
    assert len(made) == 1
    of_a_single_group = [name for name in FILES if name not in ("first_exit.png", "gains.png")]
    assert sorted(file.path for file in client.list_artifacts(made[0].info.run_id)) == of_a_single_group
    assert "exit 1" in made[0].data.tags["mlflow.note.content"]
    assert len(read_store(uri, "dist_train", "")) == 4
    trained = client.search_runs([experiment], "tags.classes = '10' and params.seed = '1'")
    assert len(trained) == 2
    assert "| 1 | 1.00 M | 51.00 |" in trained[0].data.tags["mlflow.note.content"]


def test_settings_in_a_store_are_those_of_the_last_start_and_the_parent_of_a_sweep_is_no_run(make_run):
    folder = make_run("a", [0.5], optim__lr=0.1)
    uri = track(folder)
    config = load_config(folder / "config.yaml")
    changed = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.3})})
    (folder / "config.yaml").write_text(dump_config(changed))
    Tracker(changed, {"command": "again"}).close("FINISHED")
    create_parent(changed, "sweep", {})
    (found,) = read_store(uri, "dist_train", "")
    assert found.fields == read_folder(folder).fields
    assert found.fields["optim.lr"] == "0.3"


def test_an_mlflow_that_cannot_take_a_comparison_leaves_its_files(make_run, compare_command, tmp_path):
    a, b = make_run("a", [0.5], loss__alpha=0.1), make_run("b", [0.6], loss__alpha=0.2)
    track(a)
    for _ in range(2):  # the second is put in the place of the first
        assert compare_command(a, b, "--out", "it's")[0::2] == (0, "")
    state = json.loads((a / "tracking.json").read_text())
    (a / "tracking.json").write_text(json.dumps(state | {"run_id": 32 * "0"}))
    status, _, err = compare_command(a, b, "--out", "away")
    assert (status, err.count("\n")) == (0, 1)
    assert "the comparison is not in MLflow: " in err
    assert (tmp_path / "away" / "comparison.html").is_file()
    # A copied folder has the MLflow run of another.
    shutil.copytree(a, tmp_path / "copy")
    assert read_folder(tmp_path / "copy").run_id is None


def test_a_comparison_of_other_runs_is_not_overwritten(make_run, compare_command, tmp_path):
    a, b, c = (make_run(name, [0.5], loss__alpha=0.1 * n) for n, name in enumerate("abc"))
    assert compare_command(a, b)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "comparison").iterdir()}
    status, out, err = compare_command(a, c)
    assert (status, out) == (2, "")
    assert "comparison: has a comparison of other runs (b); give another --out, or --overwrite" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "comparison").iterdir()}
    assert compare_command(b, a)[0] == 0
    assert compare_command(a, c, "--overwrite")[0] == 0
    assert ",c," in (tmp_path / "comparison" / "runs.csv").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium to measure the page")
@pytest.mark.parametrize("width", [1200, 500])
def test_twenty_groups_fit_the_window(make_run, compare_command, tmp_path, width):
    """Nothing makes the page wider than the window; at 1,200 pixels all columns are seen without scrolling a table."""
    teachers, schedules = ("none", "last", "later", "next"), ("constant", "cosine", "multistep")
    folders = [
        make_run(
            f"cifar10-{teachers[number % 4]}-{number}-seed{seed}",
            [0.4 + 0.05 * m + 0.001 * seed for m in range(11)],
            seed=seed,
            loss__teachers=teachers[number % 4],
            loss__alpha=0.05 * number,
            optim__lr=0.01 + 0.01 * number,
            optim__schedule=schedules[number % 3],
            optim__weight_decay=1e-4 * number,
            data__crop_padding=number,
        )
        for number in range(20)
        for seed in (0, 1)
    ]
    assert compare_command(*folders, "--no-track")[0] == 0
    page = tmp_path / "comparison" / "comparison.html"
    sizes = (
        "<script>document.title = [document.documentElement.scrollWidth, innerWidth, "
        "...[...document.querySelectorAll('.scroll')].map(one => one.scrollWidth - one.clientWidth)].join(' ')</script>"
    )
    page.write_text(page.read_text().replace("</body>", sizes + "</body>"))
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    found = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=LIMIT)
    whole, window, *tables = map(int, re.search(r"<title>([\d ]+)</title>", found.stdout)[1].split())
    assert whole <= window == width
    assert tables
    assert width < 1200 or set(tables) == {0}


@pytest.mark.parametrize(
    "content",
    [
        '{"exits": 5}',
        '{"exits": [{"top1": "x"}], "step": 3}',
        '{"exits": [4]}',
        '{"exits": [{"top1": 0.5, "loss": "x"}]}',
        '{"exits": [{"top1": 0.5, "multiply_adds": [1]}]}',
        '{"exits": [{"top1": 0.5}], "step": "x"}',
        '{"exits": [{"top1": 0.5}], "images": [1]}',
        '{"exits": [{"top1": 0.5}], "data": [1]}',
    ],
)
def test_a_report_of_another_form_is_one_line(content, make_run, compare_command):
    folders = make_run("a", [0.5]), make_run("b", [0.6])
    (folders[1] / "report.json").write_text(content)
    status, out, err = compare_command(*folders, "--no-track")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "b/report.json: is no report as this version writes it; make it with `dist-train eval " in err


def test_bad_input_is_one_line(make_run, compare_command, tmp_path):
    folder = make_run("a", [0.5])
    uri = track(folder)
    old = tmp_path / "old.db"
    old.write_bytes((folder.parent / "mlflow.db").read_bytes())
    with sqlite3.connect(old) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    cases = {
        (): "give either run folders, or --experiment NAME",
        ("nowhere",): "nowhere: holds no readable config.yaml; give run folders",
        (folder, "--filter", "x"): "--filter and --uri select runs in MLflow",
        ("--uri", f"sqlite:///{tmp_path}/none.db", "--experiment", "x"): "there is no such file",
        ("--uri", uri, "--experiment", "x"): "has no experiment 'x'; it has: ",
        ("--uri", uri, "--experiment", "dist_train", "--filter", "params.seed = '7'"): "no run matches",
        ("--uri", uri, "--experiment", "dist_train", "--filter", "loss = last"): "write for instance params.",
        ("--uri", f"sqlite:///{old}", "--experiment", "dist_train"): "mlflow db upgrade",
    }
    for arguments, expected in cases.items():
        status, out, err = compare_command(*arguments)
        assert (status, out) == (2, ""), arguments
        assert expected in err, arguments
        assert err.count("\n") == 1, err
    assert not (tmp_path / "comparison").exists()
    assert not (tmp_path / "none.db").exists()


def test_settings_and_files_beside_them_of_other_kinds_are_text_or_one_line(make_run, compare_command):
    folders = make_run("a", [0.5]), make_run("b", [0.6], loss__teachers="none")
    (folders[1] / "env.json").write_text('{"data": {"classes": [1], "val_data": 5, "train_images": null}}')
    (folders[1] / "tracking.json").write_text('{"folder": 5, "uri": [1], "run_id": "x"}')
    with (folders[1] / "config.yaml").open("a") as file:
        file.write("5: [1]\nodd: {a: null}\n")
    status, _, err = compare_command(*folders)
    assert (status, err) == (0, "")
    text = (folders[1] / "config.yaml").read_text()
    (folders[1] / "config.yaml").write_text(text.replace("global_batch: 64", "global_batch: [64]"))
    status, _, err = compare_command(*folders, "--no-track", "--overwrite")
    assert (status, err.count("\n")) == (2, 1)
    assert "runs/b: its train.global_batch is [64], which is no number" in err
