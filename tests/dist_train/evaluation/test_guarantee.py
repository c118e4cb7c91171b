"""Guarantees, measures of confidence, failure prediction and shift in the report, on the command line and in prediction."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dist_train import cli, evaluate
from dist_train.errors import ConfigError
from dist_train.evaluation.corruptions import TABLE, corrupt
from dist_train.evaluation.failure import aurc, auroc, failure_prediction
from dist_train.evaluation.guarantee import Request
from dist_train.evaluation.scores import features, fit_scoring
from dist_train.evaluation.thresholds import point_for_budget, point_for_risk
from dist_train.prediction.confidence import HISTORY_MEASURES, confidence_with_history
from dist_train.prediction.risk import Target
from dist_train.prediction.shares import Reference, ShareMonitor
from tests.dist_train.evaluation.test_samples import EXITS, made, reduced

REQUEST = Request([Target("gap", 0.2), Target("consistency", 0.3)], 0.1)


def evaluated(run_folder):
    report = evaluate(run_folder, request=REQUEST, shift=True)
    return report.guarantee.to_json(), [one.to_json() for one in report.shift]


def test_scores_of_samples_are_those_that_prediction_takes():
    samples = reduced(300, 33)
    labels, logits = made(300)
    logits = logits[:, labels >= 0]
    classes = logits.argmax(2).T
    for measure in HISTORY_MEASURES:
        scoring = fit_scoring(samples, measure)
        for m in range(EXITS):
            weights = scoring.weights[m] if scoring.weights else None
            wanted = confidence_with_history(logits[m], classes[:, : m + 1], measure, weights)
            np.testing.assert_allclose(scoring(samples)[:, m], wanted.numpy(), atol=1e-6)


def test_the_learned_measure_is_fitted_on_the_given_samples_alone():
    samples = reduced(400, 50)
    first = samples.select(np.arange(200))
    scoring = fit_scoring(first, "learned")
    for m in range(EXITS):
        model = LogisticRegression(max_iter=200).fit(features(first, m).numpy(), first["rank"][:, m] == 0)
        np.testing.assert_allclose(
            scoring(samples)[:, m], model.predict_proba(features(samples, m).numpy())[:, 1], atol=1e-3
        )
    never = samples.select(np.flatnonzero(samples["rank"][:, 0] > 0))
    np.testing.assert_allclose(
        fit_scoring(never, "learned")(never)[:, 0], 1 / (1 + np.exp(-never["max_probability"][:, 0])), rtol=1e-5
    )


def test_failure_prediction_is_what_scikit_learn_and_the_definitions_say():
    samples = reduced(500, 64)
    correct = samples["rank"] == 0
    scores = np.round(samples["max_probability"], 2)  # with ties
    for one in failure_prediction("max_probability", scores, samples):
        m = one.exit - 1
        assert one.auroc == pytest.approx(roc_auc_score(correct[:, m], scores[:, m]))
        draws = []
        for seed in range(50):  # ties in any order
            order = np.lexsort((np.random.default_rng(seed).random(len(samples)), -scores[:, m]))
            draws.append(np.mean(np.cumsum(~correct[order, m]) / np.arange(1, len(samples) + 1)))
        assert one.aurc == pytest.approx(np.mean(draws), abs=1e-3)
        if m == EXITS - 1:
            assert one.eefp is None
        else:
            should_exit = correct[:, m] | ~correct[:, m + 1 :].any(axis=1)
            assert one.eefp == pytest.approx(roc_auc_score(should_exit, scores[:, m]))
    assert auroc(scores[:, 0], np.ones(len(samples), dtype=bool)) is None
    assert aurc(np.arange(4.0), np.array([False, False, True, True])) == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)


@pytest.mark.parametrize("corruption", TABLE)
@pytest.mark.parametrize("side", [32, 96])
def test_corruptions_get_worse_with_severity_and_depend_on_the_image_alone(corruption, side):
    noise = gaussian_filter(np.random.default_rng(0).random((4, 3, side, side)), (0, 0, 3, 3))  # smooth, as photos are
    images = torch.from_numpy((noise - noise.min()) / (noise.max() - noise.min())).float()
    ids = [3, 9, 4, 1]
    changes = []
    for severity in range(1, 6):
        worse = corrupt(images, ids, corruption, severity)
        assert worse.shape == images.shape
        assert worse.min() >= 0
        assert worse.max() <= 1
        changes.append((worse - images).abs().mean().item())
        torch.testing.assert_close(corrupt(images[[2]], [4], corruption, severity), worse[[2]], rtol=0, atol=1e-6)
    if corruption != "pixelate":  # whose grids fit the image better at some severities than at others
        assert changes == sorted(changes)
    assert 0 < changes[0] < changes[4]


def test_the_blur_is_the_gaussian_filter():
    images = torch.rand(1, 3, 40, 30, generator=torch.Generator().manual_seed(1))
    wanted = np.stack([gaussian_filter(channel, 1.0, mode="nearest", truncate=4) for channel in images[0].numpy()])
    np.testing.assert_allclose(corrupt(images, [0], "gaussian_blur", 5)[0].numpy(), wanted, atol=1e-5)
    assert corrupt(torch.zeros(1, 3, 8, 8), [0], "brightness", 5).unique().tolist() == pytest.approx([0.3])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 224)])
def test_pixelation_is_that_of_pillow(height, width):
    image = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    images = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    for severity, side in enumerate(TABLE["pixelate"][max(height, width) > 64], start=1):
        smaller = Image.fromarray(image).resize((int(width * side), int(height * side)), Image.Resampling.BOX)
        wanted = np.asarray(smaller.resize((width, height), Image.Resampling.NEAREST))
        found = 255 * corrupt(images, [0], "pixelate", severity)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, wanted, atol=1.001)  # Pillow rounds after each direction


def test_a_share_of_exits_that_leaves_its_interval_is_said_and_no_other():
    rng = np.random.default_rng(0)
    truth = [0.6, 0.0, 0.3, 0.1]
    alarms, late = 0, 0
    for _ in range(200):
        reference = Reference((rng.multinomial(300, truth) / 300).tolist(), 300)
        monitor, other = ShareMonitor(reference), ShareMonitor(reference)
        alarm = False
        for _ in range(40):
            monitor.add(rng.choice(4, 25, p=truth))
            other.add(rng.choice(4, 25, p=[0.3, 0.0, 0.4, 0.3]))
            alarm = alarm or bool(monitor.left)
        alarms += alarm
        late += 0 not in other.left
    assert alarms <= 1
    assert late == 0
    assert "of the 300 images of the report: these images are of another kind" in other.warning()
    assert f"after 1,000 images {100 * other._counts[0] / 1000:.1f} % exit at exit 1" in other.warning()
    assert ShareMonitor(reference).warning() == ""


def test_any_number_of_ranks_certifies_the_same_thresholds(run_folder, ranks):
    (alone,) = ranks(evaluated, 1, run_folder)
    results = ranks(evaluated, 3, run_folder)
    assert results[0] == results[1] == results[2]
    found, shift = results[0]
    assert found["thresholds"][:-1] == pytest.approx(alone[0]["thresholds"][:-1], abs=1e-5)
    assert [risk["value"] for risk in found["risks"]] == [risk["value"] for risk in alone[0]["risks"]]
    assert [risk["delta"] for risk in found["risks"]] == [0.05, 0.05]
    assert found["fit_images"] + found["tested_images"] + found["images"] == 360
    assert len(shift) == 1 + 3 * len(TABLE)
    assert shift[0]["risks"][0]["value"] == found["risks"][0]["value"]
    noise = [one["exits"] for one in shift if one["corruption"] == "gaussian_noise"]
    assert noise[0] != shift[0]["exits"]
    for one, other in zip(shift, alone[1]):
        assert one["exits"] == pytest.approx(other["exits"], abs=0.01)


def test_the_command_line_guarantees_and_predicts_by_it(run_folder, tmp_path, command):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "tracking.json").unlink(missing_ok=True)
    words = ["--risk", "consistency", "--epsilon", "0.3", "--delta", "0.001", "--measure", "learned", "--per-class"]
    result = command("dist_train", "eval", folder, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = result.stdout
    assert "guaranteed with probability 0.999 on images like those of half of val: consistency at most 0.3" in shown
    assert "too few images for a guarantee of their own have " in shown
    found = json.loads((folder / "report.json").read_text())["guarantee"]
    assert len(found["classes_left_out"]) == 10  # 0.7^n of at most 18 images each is above 0.001
    assert found["risks"][0]["p_value"] <= 0.001
    assert "<h2>Guarantees</h2>" in (folder / "report.html").read_text()
    policy, reference, _ = point_for_risk(folder, "consistency")
    assert policy.measure == "learned"
    assert len(policy.weights) == 3
    assert reference.images == found["tested_images"]
    assert [None if np.isinf(value) else value for value in policy.values] == found["thresholds"]
    assert point_for_budget(folder, "0.6M").reference.images == 180


def test_bad_requests_are_one_line(run_folder, digits, refused, tmp_path):
    def said(*words):
        return refused("eval", run_folder, "--out", tmp_path / "out", *words)

    assert "--epsilon of gap is 2; give a share" in said("--risk", "gap", "--epsilon", "2")
    assert "--delta is 0; give a probability" in said("--risk", "gap", "--epsilon", "0.1", "--delta", "0")
    assert "--risk is 'luck'; use one of gap" in said("--risk", "luck", "--epsilon", "0.1")
    assert "1 --risk and 0 --epsilon are given; give one" in said("--risk", "gap")
    for words in (["--epsilon", "0.1"], ["--delta", "0.1"], ["--per-class"], ["--measure", "margin"]):
        assert "are for --risk; give one, such as" in said(*words)
    shards = shutil.copytree(digits, tmp_path / "shards")
    shutil.copytree(shards / "train", shards / "fresh")
    line = said("--shards", shards, "--calibration", "fresh", "--risk", "gap", "--epsilon", "0.1")
    assert "fresh has the images that the network was trained on (fingerprint " in line
    empty = shutil.copytree(run_folder, tmp_path / "run")
    (empty / "report.json").write_text(json.dumps({"step": json.loads((empty / "report.json").read_text())["step"]}))
    assert "has no guarantee of gap; make it with `dist-train eval" in refused(
        "predict", empty, digits, "--risk", "gap"
    )
    assert "--risk is 'luck'" in refused("predict", empty, digits, "--risk", "luck")


def test_a_guarantee_is_of_the_precision_that_was_evaluated_and_predict_computes_in_it(run_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, symlinks=True)
    losses = {}
    for precision in ("fp32", "bf16"):
        asked = () if precision == "fp32" else ("--precision", precision)  # that of the training is the default
        words = ["eval", str(folder), "--risk", "gap", "--epsilon", "0.5", "--out", str(folder), *asked]
        assert cli.run(words) == 0
        assert f" on val, in {precision}\n" in capsys.readouterr().out
        report = json.loads((folder / "report.json").read_text())
        assert report["precision"] == precision
        losses[precision] = [one["loss"] for one in report["exits"]]
        assert point_for_risk(folder, "gap").promise["precision"] == precision
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)

    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    predict = ["predict", str(folder), str(image), "--risk", "gap"]
    assert cli.run(predict) == 0
    captured = capsys.readouterr()
    assert "bf16" in captured.out
    assert "guaranteed in" not in captured.err
    assert cli.run([*predict, "--precision", "fp32"]) == 0
    assert "warning: gap is guaranteed in bf16, not in fp32" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="precision is 'int8'; use one of None, fp32, bf16, fp16"):
        evaluate(folder, precision="int8")
