"""The report as a whole: real processes on a real run, what it writes, what it refuses, and that it never looks ahead."""

import base64
import csv
import dataclasses
import io
import json
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.config import DataConfig
from dist_train.evaluation.samples import SampleCollector
from dist_train.evaluation.split import Images, _digests, balanced, without_copies
from dist_train.tracking.outcomes import RIGHT, unpack
from shards.index import Index
from tests.common import LIMIT


def evaluated(*arguments, **options):
    from dist_train import evaluate

    return evaluate(*arguments, **options)


@pytest.fixture(scope="module")
def report(run_folder, tmp_path_factory):
    """The report made in one process, in a process of its own."""
    path = tmp_path_factory.mktemp("report") / "report"
    code = "import pickle, sys; from dist_train import evaluate; pickle.dump(evaluate(sys.argv[1]), open(sys.argv[2], 'wb'))"
    subprocess.run([sys.executable, "-c", code, str(run_folder), str(path)], check=True, timeout=LIMIT)
    return pickle.loads(path.read_bytes())


def without_noise(value):
    """Numbers rounded to what the order of additions in the network cannot touch."""
    if isinstance(value, dict):
        return {key: without_noise(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_noise(one) for one in value]
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value


def test_every_number_of_ranks_gives_the_same_report(run_folder, report, ranks, digits):
    wanted = json.loads(json.dumps(report.to_json()))
    assert wanted["images"] == 360
    trained = json.loads((run_folder / "report.json").read_text())
    assert trained["format"] == wanted["format"] == 2
    assert trained["split"] == "val"
    assert trained["outcomes"] == wanted["outcomes"]
    right = unpack(wanted["outcomes"]) == RIGHT
    assert right.mean(0).tolist() == [exit["top1"] for exit in wanted["exits"]]
    assert trained["data"] == wanted["data"] == Index.load(digits / "val").fingerprint[:12]
    for mine, theirs in zip(wanted["exits"], trained["exits"], strict=True):
        assert {key: mine[key] for key in theirs} == {**theirs, "loss": pytest.approx(theirs["loss"], rel=1e-5)}
    results = ranks(evaluated, 3, run_folder)
    for result in results:
        np.testing.assert_array_equal(result.samples["prediction"], report.samples["prediction"])
        np.testing.assert_array_equal(result.samples["rank"], report.samples["rank"])
        got = json.loads(json.dumps(result.to_json()))
        for key in ("images", "unreadable", "exits", "ensemble", "temperatures", "diagnostics", "notes", "outcomes"):
            assert got[key] == without_noise(wanted[key]), key
    assert results[0].to_json() == results[1].to_json() == results[2].to_json()


def test_thresholds_are_fitted_on_a_balanced_half_and_tested_on_the_other(run_folder, report, digits):
    fitted, test = set(report.calibration.ids.tolist()), set(report.test.ids.tolist())
    assert not fitted & test
    assert fitted | test == set(report.samples.ids.tolist()) == set(range(360))
    per_class = np.bincount(report.calibration.labels, minlength=10)
    assert set(per_class.tolist()) == {np.bincount(Index.load(digits / "val").label).min() // 2}
    for sweep in report.to_json()["budgeted"]:
        assert sweep["calibration"] == "half of val"
        assert (sweep["calibration_images"], sweep["images"]) == (len(fitted), len(test))
        for point in sweep["points"]:
            assert sum(point["shares"]) == pytest.approx(1)
            assert len(point["thresholds"]) == len(point["shares"]) == 3
            assert point["cost"] == pytest.approx(np.dot(point["shares"], report.costs[sweep["cost"]]))
            assert point["top1_interval"][0] <= point["top1"] <= point["top1_interval"][1]
            if sweep["method"] == "optimal":
                assert point["calibration_cost"] <= point["budget"] * (1 + 1e-9)
    methods = {(s["method"], s["measure"], s["temperatures"] is None, s["cost"]) for s in report.to_json()["budgeted"]}
    assert len(methods) == 2 * (4 + 5)


def test_test_labels_change_no_threshold():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 400, 7, generator=generator)
    labels = torch.randint(7, (400,), generator=generator)
    logits[:, torch.arange(400), labels] += torch.tensor([1.0, 1.5, 2.0])[:, None]
    held = np.arange(400) % 2 == 0
    others = torch.where(torch.from_numpy(held), labels, (labels + 1) % 7)
    found = [_thresholds(_samples(logits, one), held) for one in (labels, others)]
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]
    moved = torch.where(torch.from_numpy(held), (labels + 1) % 7, labels)
    assert _thresholds(_samples(logits, moved), held)[0] != found[0][0]


def _samples(logits, labels):
    class Alone:
        device = torch.device("cpu")

        def sum(self, tensor):
            return tensor

    table = SampleCollector(len(labels))
    table.add(torch.arange(len(labels)), labels, list(logits))
    return table.join(Alone(), len(logits), 0)


def _thresholds(samples, held):
    from dist_train.evaluation.report import Report

    costs = {"multiply_adds": [1e6, 2e6, 4e6], "multiply_adds_lazy": [8e5, 2e6, 4e6], "parameters": [1, 2, 3]}
    report = Report(
        folder=None,
        checkpoint=None,
        step=0,
        split="val",
        index=None,
        costs=costs,
        samples=samples,
        test=samples.select(~held),
        calibration=samples.select(held),
        calibration_name="half of val",
        notes=[],
        precision="fp32",
    )
    points = [point for sweep in report.sweeps for point in sweep.points]
    thresholds = [(sweep.temperatures, [point.thresholds for point in sweep.points]) for sweep in report.sweeps]
    return thresholds, [point.top1 for point in points]


def test_budgets_from_python(report):
    costs = report.costs["multiply_adds"]
    points = report.budgeted([costs[0], costs[1], costs[2]])
    assert points[0].shares == [1, 0, 0]
    assert points[0].calibration_top1 <= points[1].calibration_top1 <= points[2].calibration_top1
    assert report.budgeted([1.0], clamp=True)[0] == points[0]
    (geometric,) = report.budgeted([costs[1]], method="geometric", scaled=True)
    assert geometric.calibration_cost <= costs[1]
    for options, said in (
        ({"measure": "luck"}, "measure is 'luck'; use one of max_probability, entropy, margin"),
        ({"cost": "milliseconds"}, "cost is 'milliseconds'; use one of multiply_adds"),
        ({"measure": "margin", "scaled": True}, "temperatures scale max_probability only"),
    ):
        with pytest.raises(ValueError, match=said):
            report.budgeted(**options)
    with pytest.raises(ValueError, match="budgets need calibration images"):
        dataclasses.replace(report, calibration=None).budgeted()


def test_everything_is_written_into_the_run_folder_and_to_mlflow(run_folder, command):
    from mlflow.tracking import MlflowClient

    best = (run_folder / "checkpoints" / "best").resolve()
    shown = command("dist_train", "eval", run_folder, "--milliseconds", "--budgets", "1,1G", "--clamp")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "360 images, each once" in shown.stdout
    content = json.loads((run_folder / "report.json").read_text())
    assert content["step"] == json.loads((best / "state.json").read_text())["progress"]["step"]
    times = [one["milliseconds"] for one in content["exits"]]
    assert 0 < times[0] < times[1] < times[2]
    timing = content["timing"]
    assert timing["milliseconds"] == times
    assert timing["precision"] in ("fp32", "bf16")
    assert f"{timing['precision']}, {timing['threads']} thread" in shown.stdout
    assert ("other processes took" in shown.stdout) == (timing["others"] > 0.15)
    assert {sweep["cost"] for sweep in content["budgeted"]} == {
        "multiply_adds",
        "multiply_adds_public",
        "multiply_adds_lazy",
        "milliseconds",
    }
    page = (run_folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 6
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert "http" not in page
    with (run_folder / "report" / "budgeted.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(sweep["points"]) for sweep in content["budgeted"])
    assert not list(run_folder.rglob("*.tmp"))

    state = json.loads((run_folder / "tracking.json").read_text())
    client = MlflowClient(tracking_uri=state["uri"])
    here = {path.name for path in (run_folder / "report").iterdir()}
    assert {entry.path.removeprefix("report/") for entry in client.list_artifacts(state["run_id"], "report")} == here
    assert {"report.json", "report.html"} <= {entry.path for entry in client.list_artifacts(state["run_id"])}
    metrics = client.get_run(state["run_id"]).data.metrics
    assert metrics["report/exit3/ece"] == content["exits"][2]["ece"]


def test_a_folder_of_weights_is_enough(run_folder, report, ranks, tmp_path):
    best = (run_folder / "checkpoints" / "best").resolve()
    for name in ("model.safetensors", "config.yaml", "state.json"):
        shutil.copy(best / name, tmp_path)
    (result,) = ranks(evaluated, 1, tmp_path)
    assert result.folder == tmp_path
    np.testing.assert_array_equal(result.samples["prediction"], report.samples["prediction"])


def test_another_split_for_calibration(run_folder, digits, ranks, tmp_path):
    shards = shutil.copytree(digits, tmp_path / "shards")
    shutil.copytree(shards / "train", shards / "fresh")  # as if it had been kept from training
    (result,) = ranks(evaluated, 1, run_folder, None, shards, "fresh")
    assert result.calibration_name == "fresh"
    assert len(result.test) == len(result.samples) == 360
    counts = np.bincount(Index.load(digits / "train").label)
    assert np.bincount(result.calibration.labels).tolist() == [counts.min()] * 10


@pytest.mark.parametrize("how", [[], ["--copy"]])
def test_images_of_the_training_are_found_in_shards_made_anew(
    how, run_folder, digits, ranks, refused, command, tmp_path
):
    made = command("shards", "subset", digits, tmp_path / "few", "--per-class", 20, *how)
    assert made.returncode == 0, made.stderr
    shards = shutil.copytree(digits, tmp_path / "shards")
    shutil.copytree(tmp_path / "few" / "train", shards / "part")
    said = "200 of the 200 images of part that thresholds are fitted on were trained on"
    words = ["--shards", shards, "--calibration", "part"]
    assert said in refused("eval", run_folder, *words, "--risk", "gap", "--epsilon", "0.1")
    (result,) = ranks(evaluated, 1, run_folder, None, shards, "part")
    assert any(said in note for note in result.notes)


def test_of_copies_within_a_split_none_is_on_both_sides(command, tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(20):
                pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                for copy in ("", "-copy"):
                    Image.fromarray(pixels).save(folder / f"{number}{copy}.png")
    made = command("shards", "make", "folder", tmp_path / "photos", tmp_path / "made")
    assert made.returncode == 0, made.stderr
    index = Index.load(tmp_path / "made" / "val")
    half = balanced(index, 0.5)
    images = Images(index, DataConfig(shards=tmp_path / "made"), "val")
    ids = without_copies(images, half)
    content = dict(_digests(images, np.arange(80)))
    assert len(set(content.values())) == 40
    assert 0 < len(ids) < len(half) == 40
    assert {content[one] for one in half} & {content[one] for one in np.setdiff1d(np.arange(80), half)}
    assert not {content[one] for one in ids} & {content[one] for one in np.setdiff1d(np.arange(80), ids)}


def test_bad_input_is_one_line(run_folder, digits, refused, tmp_path):
    shards = shutil.copytree(digits, tmp_path / "shards")
    shutil.copytree(shards / "val", shards / "again")
    assert "no checkpoint here; give a run folder" in refused("eval", tmp_path)
    assert "--calibration train is what the network was trained on" in refused(
        "eval", run_folder, "--calibration", "train"
    )
    assert "no such folder of shards" in refused("eval", run_folder, "--calibration", "kept")
    said = refused("eval", run_folder, "--shards", shards, "--calibration", "again")
    assert "360 images of again are in val as well" in said
    # The default here is val, so that to give none is no remedy.
    said = refused("eval", run_folder, "--shards", shards, "--split", "again")
    assert "360 images of val are in again as well" in said
    assert "--calibration again to hold out half of it" in said
    assert "--budgets is 'lots'; give multiply-adds" in refused("eval", run_folder, "--budgets", "1M,lots")
    (tmp_path / "file").write_text("")
    assert "cannot be written; give another folder" in refused("eval", run_folder, "--out", tmp_path / "file")


def test_a_budget_out_of_range_is_said_before_the_evaluation(run_folder, refused, tmp_path):
    said = refused("eval", run_folder, "--budgets", "1", "--out", tmp_path / "out")
    # "rank 0" is named where another test of this process has left a process group.
    line = r"dist-train eval: (rank 0: )?budget 1 multiply_adds is below the first exit's .*\(--clamp\)\n"
    assert re.fullmatch(line, said)
    assert "--clamp is for --budgets" in refused("eval", run_folder, "--clamp")
    assert not (tmp_path / "out").exists()


def test_the_held_out_half_depends_on_names_alone(digits):
    index = Index.load(digits / "val")
    half = balanced(index, 0.5)
    order = np.random.default_rng(0).permutation(len(index))
    shuffled = dataclasses.replace(index, key=index.key[order], label=index.label[order])
    assert {bytes(index.key[sample]) for sample in half} == {bytes(shuffled.key[s]) for s in balanced(shuffled, 0.5)}
    alone = dataclasses.replace(index, label=np.where(index.label == 3, -100, index.label))
    assert len(balanced(alone)) == 0
