"""The section ``data``: which shards are read, and how an image becomes a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from dist_train.config.base import Natural, NotNegative, Positive, Section, Unit, UserPath, path_or_url


class PartConfig(Section):
    """One part of a mixture of images to train on."""

    shards: Annotated[Path | str, BeforeValidator(path_or_url)]
    """Folder made by `dist-train shards make`, with one folder per split; or its URL."""
    split: str = "train"
    """Split of it."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each image comes per epoch: 2 is twice; with 0.5 half of the images come, and the others in the next epoch."""
    where: str | None = None
    """Condition on the images, such as min(width, height) >= 96 (default: all)."""


Side = Annotated[int, Field(ge=0, le=65535)]
"""Of an image, in pixels; JPEG has no longer ones."""


def _kind_of_training(given: Any) -> str | None:
    if isinstance(given, str):
        return "split"
    return MIXTURE if isinstance(given, list | tuple) else None


MIXTURE = "mixture"
"""What pydantic calls the second of these in the place of an error."""

TrainedOn = Annotated[
    Annotated[str, Tag("split")] | Annotated[tuple[PartConfig, ...], Field(min_length=1), Tag(MIXTURE)],
    Discriminator(
        _kind_of_training,
        custom_error_type="training_data",
        custom_error_message="give the name of a split, or a list of {shards: FOLDER, split: train}",
    ),
]
"""A split, or a mixture of parts."""


class DataConfig(Section):
    """Which shards are read, and how an image becomes a tensor."""

    shards: Annotated[Path | str, BeforeValidator(path_or_url)]
    """Folder made by `dist-train shards make`, with one folder per split; or its URL (s3://, gs://, https://)."""
    cache: UserPath | None = None
    """Local folder that caches shards behind a URL (default: ~/.cache/dist_train); processes and runs share it."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Size of that cache, in GB; the least recently used shards are evicted."""
    train: TrainedOn = "train"
    """Split to train on; or a mixture, a list of {shards: FOLDER, split: train, weight: 1, where: CONDITION}."""
    val: str = "val"
    """Split to validate on, during training and at its end."""
    image_size: Annotated[int, Field(ge=8, le=1024)] = 32
    """Height and width of the network's input, in pixels."""
    augment: Literal["pad_crop", "resized_crop", "none"] = "pad_crop"
    """Training crop: pad_crop shifts small images, resized_crop is the usual one for large images, none takes the evaluation view."""
    crop_padding: Natural = 4
    """Largest shift of pad_crop, in pixels; the padding has the mean color."""
    flip: bool = True
    """Flip half of the training images horizontally (off for digits and text)."""
    crop_scale: tuple[Unit, Unit] = (0.08, 1.0)
    """Range of the crop's area in resized_crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio (width / height) in resized_crop."""
    color_jitter: tuple[NotNegative, NotNegative, NotNegative, Annotated[float, Field(ge=0, le=0.5)]] | None = None
    """Largest change of brightness, contrast, saturation (factors 1 - x to 1 + x) and hue (-x to x turns) (default: none)."""
    rand_augment: tuple[Annotated[int, Field(ge=1, le=32)], Annotated[int, Field(ge=0, le=30)]] | None = None
    """RandAugment: operations per image, up to 32, and their strength from 0 to 30, for instance [2, 9] (default: none)."""
    random_erasing: Unit = 0.0
    """Fraction of training images in which a random rectangle is set to the mean color."""
    mixup: NotNegative = 0.0
    """Mixup: lambda is drawn from Beta(a, a) with this a; 0 is off; with cutmix on as well, each gets half of the images."""
    cutmix: NotNegative = 0.0
    """Cutmix: the fraction of the area is drawn from Beta(a, a) with this a; 0 is off."""
    eval_resize: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Shorter side before the center crop in evaluation, in pixels (default: image_size; for 224-pixel inputs usually 256)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean of RGB, 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation of RGB, 0 to 1."""
    last_batch: Literal["drop", "wrap"] = "drop"
    """The incomplete last global batch of an epoch: dropped, or filled from the start of the epoch, with images that then come again."""
    shuffle_shards: Positive = 16
    """Number of shards whose samples are shuffled together; reads stay near-sequential within them."""
    labeled_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of labeled images in every global batch (default: as they come); an epoch is then one pass over the longer part."""
    class_balanced: bool = False
    """Draw every class of the labeled images equally often: rare ones several times per epoch, frequent ones in part."""
    repeated_augment: Positive = 1
    """Repeated augmentation: views of each image in a global batch; one pass over the images then takes as many epochs."""
    decoder: Literal["auto", "gpu", "cpu"] = "auto"
    """What decodes the images: auto is the GPU that trains where there is one; cpu leaves that GPU's memory and time to the network."""
    decode_threads: Annotated[int, Field(ge=1, le=256)] | None = None
    """Decoding threads per process (default: this process's share of the cores)."""
    io_threads: Annotated[int, Field(ge=1, le=64)] = 4
    """Threads per process that read samples from the shards; more help on file systems with high latency."""
    prefetch: Annotated[int, Field(ge=1, le=8)] = 2
    """Micro batches prepared ahead of the network."""
    hw_decoder_load: Unit = 0.65
    """Fraction of the JPEGs given to the GPU's hardware decoder, if it has one (GPU only)."""
    preallocate: tuple[Side, Side] = (0, 0)
    """Width and height, in pixels, for which the GPU decoder preallocates memory; best those of the largest image (GPU only)."""
    verify: Literal["auto", "size", "hash"] = "auto"
    """How shards are checked against their index before training: by size, by hash, or (auto) by hash up to 1 GB."""
    max_unreadable: Natural = 100
    """Number of unreadable images a run tolerates before it stops."""

    def location(self, split: str) -> Path | str:
        """Folder or URL of a split."""
        return self.shards / split if isinstance(self.shards, Path) else f"{self.shards.rstrip('/')}/{split}"

    @property
    def training_locations(self) -> list[Path | str]:
        """Folders or URL of what is trained on."""
        return [data.location(split) for data, split in self.training_splits]

    @property
    def training_splits(self) -> list[tuple[DataConfig, str]]:
        """What is trained on: of a mixture for every part these settings with its own shards, and its split."""
        if isinstance(self.train, str):
            return [(self, self.train)]
        return [(self.model_copy(update={"shards": part.shards}), part.split) for part in self.train]

    @property
    def train_name(self) -> str:
        """What is trained on, for messages."""
        return " + ".join(map(str, self.training_locations))

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(
                f"crop_scale is {list(self.crop_scale)}; it must be two rising numbers above 0 and at most 1"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio is {list(self.crop_ratio)}; it must be two rising numbers above 0")
        if self.augment == "pad_crop" and self.crop_padding > self.image_size:
            raise ValueError(
                f"crop_padding is {self.crop_padding}; it must be at most image_size, {self.image_size}, or nothing of an image "
                "may be left"
            )
        varied = [
            name
            for name in ("color_jitter", "rand_augment", "random_erasing", "mixup", "cutmix")
            if getattr(self, name)
        ]
        if self.augment == "none" and varied:
            raise ValueError(
                f"augment is none, but {' and '.join(varied)} would vary the images; choose one of the two"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}; every number must be above 0")
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(f"eval_resize is {self.eval_resize}; it must be at least image_size, {self.image_size}")
        return self
