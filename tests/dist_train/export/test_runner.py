"""predict.py of an export: where torch is not installed, on odd images, and by every measure of confidence."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.export import runner
from dist_train.export.runner import EarlyExit
from dist_train.prediction import Thresholds
from dist_train.prediction.confidence import HISTORY_MEASURES, MEASURES
from dist_train.prediction.images import Predictor
from tests.common import imported_by, saved
from tests.dist_train.export.test_export import policy_of, thresholds_of


@pytest.mark.parametrize("name", ["msdnet", "vit"])
def test_files_are_classified_where_torch_is_not_installed(name, runs, exported, photos, elsewhere, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(exported[name], moved)
    expected = list(Predictor(runs[name], thresholds_of(policy_of(exported[name]))).run(photos))
    (tmp_path / "text.jpg").write_text("no image")
    done = elsewhere(moved / "predict.py", *photos, tmp_path / "text.jpg", "--threads", "1")
    assert done.returncode == 0
    assert done.stderr.startswith(f"unreadable: {tmp_path / 'text.jpg'}: cannot identify image file")
    assert done.stderr.count("\n") == 1
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [(row[2], int(row[1]), row[3]) for row in rows] == [(p.label, p.exit, p.image) for p in expected]
    assert [float(row[0]) for row in rows] == pytest.approx([p.confidence for p in expected], abs=1e-4)
    # Within msdnet's budget, all images may leave at one exit.
    assert len({p.exit for p in expected}) > 1 or name == "msdnet"


def test_a_thin_picture_is_refused_before_it_fills_the_memory(exported, tmp_path):
    Image.new("L", (4000, 2)).save(tmp_path / "thin.png")
    Image.new("L", (200, 2)).save(tmp_path / "allowed.png")
    network = EarlyExit(exported["vit"])
    with pytest.raises(OSError, match="4000 x 2 pixels; one side may be at most 100 times the other"):
        network.load(tmp_path / "thin.png")
    assert network.load(tmp_path / "allowed.png").shape == (3, 32, 32)


def test_what_is_wrong_is_one_line(exported, photos, elsewhere, tmp_path):
    def said(folder, *arguments, **options):
        done = elsewhere(folder / "predict.py", *arguments, **options)
        assert done.returncode != 0
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    for file, reason in (("policy.json", "policy.json was changed"), ("stage2.onnx", "stage2.onnx is not the one")):
        folder = tmp_path / file
        shutil.copytree(exported["vit"], folder)
        data = bytearray((folder / file).read_bytes())
        place = data.index(b"thresholds") if file == "policy.json" else len(data) // 2
        data[place] = ord("1") if file == "policy.json" else data[place] ^ 1
        (folder / file).write_bytes(data)
        assert reason in said(folder, photos[0])
    assert "--threads is -1; give the number" in said(exported["vit"], photos[0], "--threads", "-1")
    assert "no image" not in said(exported["vit"], tmp_path / "absent.png")
    assert "pip install numpy pillow onnxruntime" in said(exported["vit"], photos[0], path=tmp_path)


def test_it_is_short_and_imports_nothing_else():
    text = Path(runner.__file__).read_text()
    assert len(text.splitlines()) <= 150
    assert imported_by(text) == {"numpy", "PIL", "onnxruntime"}


@pytest.mark.parametrize("measure", [*MEASURES, *HISTORY_MEASURES])
@pytest.mark.parametrize("temperatures", [None, [0.7, 1.0, 2.5]])
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_confidence_is_that_of_prediction(measure, temperatures, classes):
    generator = torch.Generator().manual_seed(classes)
    logits = [5 * torch.randn(50, classes, generator=generator) for _ in range(3)]
    logits[0][0, 0] = 300.0  # all other probabilities are 0 in float32
    predicted = torch.stack([one.argmax(1) for one in logits], 1)
    weights = [[1.0, -0.5, 2.0, 0.3, 0.1, -1.0]] * 3
    policy = Thresholds([0.5] * 3, measure, temperatures, weights)
    network = object.__new__(EarlyExit)
    network.policy = {"measure": measure, "temperatures": temperatures, "weights": weights}
    for number in range(3):
        so_far = predicted[:, : number + 1]
        expected = policy.scores(number, logits[number], so_far)
        got = network.confidence(number, logits[number].numpy(), so_far.numpy())
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected.numpy(), atol=2e-6)


def test_images_are_prepared_as_evaluation_prepares_them(runs, exported, tmp_path):
    """Sizes that do not divide, one side long, grey, palette, transparent, 16 bits: within rounding of each pixel."""
    rng = np.random.default_rng(0)
    network = EarlyExit(exported["msdnet"])
    smooth = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    pictures = {
        f"{w}x{h}": saved(smooth.resize((w, h), Image.Resampling.BICUBIC), "PNG")
        for w, h in ((32, 32), (33, 47), (200, 61), (20, 90), (301, 300))
    }
    photo = smooth.resize((80, 60), Image.Resampling.BICUBIC)
    for mode in ("L", "P", "RGBA", "LA"):
        pictures[mode] = saved(photo.convert(mode), "PNG")
    pictures["16 bit"] = saved(Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG")
    pictures["JPEG"] = saved(photo, "JPEG", quality=90)
    predictor = Predictor(runs["msdnet"])
    deviation = torch.tensor(policy_of(exported["msdnet"])["preprocessing"]["std"]).view(3, 1, 1)
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
        ((_, images),) = predictor._read([tmp_path / name])
        levels = (torch.from_numpy(network.load(io.BytesIO(data))) - images[0]).abs() * deviation * 255
        assert levels.mean() <= 0.6, name
        assert levels.max() <= 2.01, name
