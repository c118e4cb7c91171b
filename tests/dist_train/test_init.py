"""`dist-train init`: configurations that fit the images, and that `plan` accepts as they are."""

import numpy as np
import pytest
from PIL import Image

from dist_train import load_config, plan
from dist_train.cli import run
from tests.common import importable


def shards(folder, width, height, color):
    """Shards of 40 images of two classes, of one color with a little noise."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(random.normal(color, 20, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    words = ["shards", "make", "folder", folder / "photos", folder / "shards", "--val-per-class", "4", "--workers", "1"]
    assert run(list(map(str, words))) == 0
    return folder / "shards"


@pytest.mark.parametrize(
    ("kind", "width", "height", "size", "augment"),
    [
        ("photos", 300, 240, 224, "resized_crop"),
        ("photos", 28, 20, 32, "pad_crop"),
        ("vit", 70, 90, 64, "pad_crop"),
        ("vit", 200, 170, 160, "resized_crop"),
    ],
)
def test_a_configuration_fits_the_images_and_can_run(tmp_path, monkeypatch, kind, width, height, size, augment):
    if kind == "vit":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    folder = shards(tmp_path, width, height, (51, 102, 204))
    assert run(["init", kind, "--data", str(folder), "--out", "mine.yaml"]) == 0
    config = load_config("mine.yaml")
    assert (config.data.image_size, config.data.augment) == (size, augment)
    assert config.data.mean == pytest.approx((0.2, 0.4, 0.8), abs=0.01)
    assert config.train.global_batch <= 32  # the images of the training split
    result = plan(config)
    assert not result.problems
    assert len(result.costs) == 4


@pytest.mark.parametrize(
    ("network", "exits", "pooling", "size"),
    [
        ("resnet18", ("layer1", "layer2", "layer3"), "mean", 64),
        ("vit_tiny_patch16_224", ("blocks.2", "blocks.5", "blocks.8"), "class_token", 224),
        ("swin_tiny_patch4_window7_224", ("layers.0", "layers.1", "layers.2"), "mean", 224),
    ],
)
def test_exits_size_and_normalisation_of_a_timm_network_are_its_own(
    tmp_path, monkeypatch, network, exits, pooling, size
):
    if not importable("timm"):
        pytest.skip("timm is not installed, or torchvision is of another build of torch")
    monkeypatch.chdir(tmp_path)
    folder = shards(tmp_path, 70, 90, (51, 102, 204))
    assert run(["init", "timm", "--data", str(folder), "--network", network]) == 0
    config = load_config("timm.yaml", "--model.pretrained", "false")  # which would be downloaded
    assert (config.model.exits, config.model.pooling, config.data.image_size) == (exits, pooling, size)
    assert config.data.mean == ((0.5, 0.5, 0.5) if "vit" in network else (0.485, 0.456, 0.406))
    result = plan(config)
    assert not result.problems
    costs = [cost.macs for cost in result.costs]
    assert len(costs) == 4
    assert costs == sorted(costs)


def test_without_timm_it_is_said_how_to_install_it(tmp_path, monkeypatch, capsys):
    if importable("timm"):
        pytest.skip("timm is installed")
    monkeypatch.chdir(tmp_path)
    folder = shards(tmp_path, 40, 40, (51, 102, 204))
    capsys.readouterr()
    assert run(["init", "timm", "--data", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "pip install dist-train[timm]" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "timm.yaml").exists()
    assert run(["init", "vit", "--data", str(folder), "--network", "resnet18"]) == 2
    assert "dist-train init timm --network resnet18" in capsys.readouterr().err


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_the_precision_is_one_that_the_machine_computes_fast(tmp_path, monkeypatch, capability):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert run(["init", "--data", str(shards(tmp_path, 40, 40, (51, 102, 204)))]) == 0
    config = load_config("photos.yaml")
    assert config.train.precision == ("fp32" if capability == "AVX2" else "bf16")
    assert not plan(config).warnings
    asked = plan(load_config("photos.yaml", "--train.precision", "bf16")).warnings
    assert ["emulate bf16" in one for one in asked] == [True] * (capability == "AVX2")


def test_a_shipped_configuration_takes_the_shards_that_are_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["init", "imagenet", "--data", "/somewhere"]) == 0
    assert str(load_config("imagenet.yaml").data.shards) == "/somewhere"
    assert "yaml-language-server" not in (tmp_path / "imagenet.yaml").read_text()
    before = (tmp_path / "imagenet.yaml").read_text()
    assert run(["init", "imagenet"]) == 2
    assert "imagenet.yaml: exists already" in capsys.readouterr().err
    assert (tmp_path / "imagenet.yaml").read_text() == before


@pytest.mark.parametrize(("out", "name"), [("_x.yaml", "x"), ("über.yaml", "ber"), ("-.yaml", "run")])
def test_odd_names_of_the_file_give_a_name_that_runs_can_have(out, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards(tmp_path, 20, 20, 100)
    assert run(["init", "photos", "--data", "shards", f"--out={out}"]) == 0
    assert load_config(out).name == name


def test_images_too_large_to_be_opened_are_one_line(tmp_path, monkeypatch, capsys):
    folder = shards(tmp_path, 64, 48, (10, 20, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    capsys.readouterr()
    assert run(["init", "--data", str(folder), "--out", str(tmp_path / "x.yaml")]) == 2
    assert "none of 256 images can be read; run `dist-train shards check`" in capsys.readouterr().err


def test_without_shards_it_is_said_how_to_make_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["init"]) == 2
    assert "make it with" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
