"""``dist-train init``: writes a configuration to start from, fitted to the shards that it is for."""

from __future__ import annotations

import io
import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dist_train.arguments import Parser
from dist_train.config import DataConfig
from dist_train.config_file import make_config, parse_yaml
from dist_train.data.reader import ShardReader
from dist_train.data.split import open_split
from dist_train.errors import ConfigError, DataError
from dist_train.files import write_whole
from dist_train.models.named import describe_timm
from dist_train.precision import emulation_warning
from shards.index import Index

SHIPPED = {
    "digits": "quickstart.yaml",
    "cifar10": "cifar10_laptop.yaml",
    "imagenet": "imagenet_msdnet.yaml",
}
"""Kinds whose configuration is shipped, and its file."""

SCHEMA_LINE = "# yaml-language-server: $schema=schema.json\n"
"""For editors, in shipped configurations, which lie beside the schema."""

NETWORK = "resnet18"
"""The network of ``init timm`` where none is named."""

SIZES = (32, 64, 96, 128, 160, 192, 224)
"""Image sizes to choose from, in pixels."""

SMALL = 96
"""Image sizes below are shifted for augmentation, others are cropped; MSDNet's stem for large images begins here, too."""

SAMPLED = 256
"""Images that the mean and standard deviation are taken from."""

FITTED = """\
# {images} images of {classes} classes, {width} x {height} pixels (median): a start to change, made by `dist-train init`.
# See what it would do: dist-train plan {file}    Train: dist-train launch local {file}
# Every field: dist-train train --help
name: {name}
data:
  shards: {shards}
  image_size: {size}            # pixels that the network sees; {size_from}
  augment: {augment}
  eval_resize: {resize}           # shorter side before the center crop in evaluation
  mean: [{mean}]  # {mean_from}
  std: [{std}]
{network}loss:
  distill_loss: kl            # the later exits teach the earlier ones; loss.teachers none is the baseline without
{optimizer}train:
  epochs: 60
  global_batch: {batch}           # images per update
  micro_batch: {micro}             # images per forward pass of one process: lower it where memory does not suffice
{precision}"""

FP32 = """\
  precision: fp32             # this CPU has to emulate bf16, several times slower; remove this line for another machine
"""

MSDNET = """\
model:
  name: msdnet                # exits of its own; others: docs/configuration.md, model.name
  exits: 4
  scales: {scales}
  growth: {growth}
  growth_factors: [{factors}]
  bottleneck_factors: [{factors}]
  initial_channels: {channels}
  base: 2
  step: 2
"""

SGD = """\
optim:
  lr: 0.1
  schedule: cosine
"""

VIT = """\
model:
  name: transformers/ViTConfig    # pip install "dist-train[transformers]"; the size is that of DeiT-Ti
  exits: [vit.layers.2, vit.layers.5, vit.layers.8]       # after these of the 12 layers; the network's end is one more exit
  pooling: class_token
  options: {{hidden_size: 192, num_hidden_layers: 12, num_attention_heads: 3, intermediate_size: 768, patch_size: {patch}}}
"""

TIMM = """\
model:
  name: {name}           # pip install "dist-train[timm]"
  exits: [{exits}]       # after these submodules; the network's end is one more exit
  pooling: {pooling}
  pretrained: true            # timm's weights, downloaded at the first start; false: from scratch
"""

ADAMW = """\
optim:
  name: adamw
  lr: 0.0005
  weight_decay: 0.05
  max_grad_norm: 1
  schedule: cosine
"""


def run(arguments: list[str]) -> int:
    """Write the configuration, and say what comes next."""
    parser = Parser("dist-train init", description="Write a configuration to start from, in the current folder.")
    parser.add_argument(
        "kind",
        nargs="?",
        default="photos",
        choices=("photos", "vit", "timm", *SHIPPED),
        help="fitted to the shards of --data: photos (default) with an MSDNet, vit with a transformer, timm with a network of "
        "timm; the others are shipped",
    )
    parser.add_argument(
        "--network", metavar="NAME", help=f"of timm (default: {NETWORK}); its exits are chosen by depth"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="shards, made by `dist-train shards make`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: KIND.yaml)")
    known = parser.parse_args(arguments)
    if known.network and known.kind != "timm":
        raise ConfigError(f"--network {known.network} is for timm; run: dist-train init timm --network {known.network}")
    out = known.out or Path(f"{known.kind}.yaml")
    if out.exists():
        raise DataError(f"{out}: exists already; give another --out, or remove it")
    if known.kind in SHIPPED:
        text = (files("dist_train") / "configs" / SHIPPED[known.kind]).read_text().replace(SCHEMA_LINE, "")
        if known.data:
            text = re.sub(
                r"^  shards: .*$", lambda _: f"  shards: {json.dumps(str(known.data))}", text, count=1, flags=re.M
            )
    else:
        text = fitted(known.data or Path("data/photos"), out, known.kind, known.network or NETWORK)
    config = make_config(parse_yaml(text, str(out)))  # before it is written, so that nothing unusable is left
    try:
        write_whole(out, text)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    print(f"{out} is written; next:")
    if not Path(str(config.data.shards)).exists():
        print(f"  dist-train shards make --help             # how shards are made, into {config.data.shards}")
    print(f"  dist-train plan {out}\n  dist-train launch local {out}")
    return 0


def fitted(shards: Path, out: Path, kind: str, network: str = NETWORK) -> str:
    """A configuration whose size, augmentation, normalisation, network and batch fit the shards in a folder.

    Args:
        shards: folder of the splits.
        out: the file that it will be written to.
        kind: photos, vit or timm.
        network: name of the network where the kind is timm, whose weights want their own normalisation, and some of them
            their own size.

    Raises:
        DataError: there are no shards.
        ConfigError: timm is not installed, or has no such network.
    """
    index = open_split(DataConfig(shards=shards), "train")
    width, height = int(np.median(index.width)), int(np.median(index.height))
    # As large as the images allow, but no image is blown up to be seen.
    size = max([one for one in SIZES if one <= min(width, height)], default=SIZES[0])
    size_from = "the shorter side of most images has at least so many"
    mean, std = _mean_and_std(index, size)
    mean_from = f"of up to {SAMPLED} of these images"
    if kind == "timm":
        timm = describe_timm(network)
        if timm.image_size:
            size, size_from = timm.image_size, f"{network} takes no others"
        mean, std, mean_from = timm.mean, timm.std, f"those that the weights of {network} were trained with"
        model = TIMM.format(name=f"timm/{network}", exits=", ".join(timm.exits), pooling=timm.pooling)
    elif kind == "vit":
        model = VIT.format(patch=4 if size == 32 else 8 if size <= 128 else 16)
    elif size < SMALL:
        model = MSDNET.format(scales=3, growth=4, factors="1, 2, 4", channels=8)
    else:
        model = MSDNET.format(scales=4, growth=8, factors="1, 2, 4, 4", channels=16)
    small = size < SMALL
    # Eight updates per epoch or more, as far as the images allow.
    batch = max(one for one in (8, 16, 32, 64, 128) if one <= max(8, len(index) // 8))
    return FITTED.format(
        images=len(index),
        classes=len(index.classes),
        width=width,
        height=height,
        file=out,
        # Quoted: a name of digits is a number in YAML, and a path may have a #.
        name=json.dumps(re.sub(r"[^A-Za-z0-9._-]", "_", out.stem).lstrip("._-") or "run"),
        shards=json.dumps(str(shards)),
        size=size,
        size_from=size_from,
        augment="pad_crop" if small else "resized_crop",
        # 8 / 7 is the usual 256 to 224.
        resize=size if small else round(size * 8 / 7),
        mean=", ".join(f"{value:.3f}" for value in mean),
        mean_from=mean_from,
        std=", ".join(f"{value:.3f}" for value in std),
        network=model,
        optimizer=SGD if kind == "photos" else ADAMW,
        batch=batch,
        micro=min(batch, 64 if small else 32),
        precision=FP32 if emulation_warning("bf16", "cuda" if torch.cuda.is_available() else "cpu") else "",
    )


def _mean_and_std(index: Index, size: int) -> tuple[list[float], list[float]]:
    """Per channel, 0 to 1, over some of the images, spread evenly over the split."""
    assert index.folder is not None
    reader = ShardReader(index, index.folder)
    pixels = []
    try:
        for sample in np.linspace(0, len(index) - 1, min(SAMPLED, len(index))).astype(int).tolist():
            try:
                with Image.open(io.BytesIO(reader.read(sample).tobytes())) as image:
                    pixels.append(np.asarray(image.convert("RGB").resize((size, size)), dtype=np.float64) / 255)
            except (OSError, ValueError, Image.DecompressionBombError):
                continue  # `dist-train shards check` says which cannot be read
    finally:
        reader.close()
    if not pixels:
        raise DataError(f"{index.folder}: none of {SAMPLED} images can be read; run `dist-train shards check`")
    values = np.stack(pixels)
    # An even colour has no deviation, by which the pixels are divided.
    return values.mean(axis=(0, 1, 2)).tolist(), np.maximum(values.std(axis=(0, 1, 2)), 0.01).tolist()
