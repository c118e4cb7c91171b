"""Teachers from outside of the network: the moving average of its own weights, another run, or a network of a library."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dist_train.config import AVERAGED, Config, DataConfig
from dist_train.errors import ConfigError
from dist_train.files import sha256
from dist_train.hub import is_address
from dist_train.models import network_of_library
from dist_train.precision import autocast
from dist_train.training import checkpoint

log = logging.getLogger("dist_train")


class OutsideTeachers:
    """The networks that ``loss.outside_teachers`` names, on this rank's device, in evaluation mode; none of them trains."""

    def __init__(
        self, config: Config, classes: Sequence[str], device: torch.device, averaged: nn.Module | None = None
    ) -> None:
        """Load them; ``averaged`` is what :func:`share_averages` gave.

        Raises:
            UserError: a teacher that cannot be built or read, or does not classify these images into these classes.
        """
        self._autocast = partial(autocast, config.train.precision, device)
        self._networks = [
            averaged if averaged is not None and name == AVERAGED else _load(name, config, classes)
            for name in config.loss.outside_teachers
        ]
        for network in self._networks:
            network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def logits(self, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What each teacher gives, of one with exits the last one: [N, K] in ``dtype``, for images [N, 3, H, W]."""
        if not self._networks:
            return ()
        with self._autocast():
            return tuple(_last(network(images)).to(dtype) for network in self._networks)


def share_averages(network: nn.Module, averages: Mapping[str, Tensor]) -> nn.Module:
    """Let a network have the very tensors of the moving average, by name, so that it is always up to date."""
    own = dict([*network.named_parameters(), *network.named_buffers()])
    for name, tensor in averages.items():
        own[name].data = tensor
    return network


def check_teachers(config: Config, stage: int, classes: Sequence[str]) -> None:
    """Refuse, without loading weights, teachers that are not there or were trained for other images or classes.

    Args:
        config: the run's.
        stage: its ZeRO stage.
        classes: of its data.

    Raises:
        UserError: names the teacher and what differs.
    """
    for name in config.loss.outside_teachers:
        if name == AVERAGED:
            if stage == 3:
                raise ConfigError(
                    "loss.outside_teachers has averaged, whose weights train.zero_stage 3 divides among the processes; use "
                    "stage 0, 1 or 2"
                )
        elif isinstance(source := _source(name), _Run):
            source.check(config.data, classes)


def teacher_fingerprints(config: Config) -> dict[str, str]:
    """By name, the SHA-256 of the weights of every teacher that is a run or a folder of weights."""
    sources = {name: _source(name) for name in config.loss.outside_teachers if name != AVERAGED}
    return {name: source.fingerprint() for name, source in sources.items() if isinstance(source, _Run)}


@dataclass(frozen=True)
class _Run:
    """A teacher that was trained by this project: a run folder, a checkpoint, a folder of weights, or ``hf://ORG/NAME``."""

    name: str

    def fingerprint(self) -> str:
        return sha256(checkpoint.evaluated_weights(checkpoint.find(self.name)))

    def check(self, data: DataConfig, classes: Sequence[str]) -> None:
        meta, config = checkpoint.read_meta(checkpoint.find(self.name))
        if list(meta.classes) != list(classes):
            raise ConfigError(
                f"loss.outside_teachers has {self.name}, which knows {len(meta.classes)} classes, {', '.join(meta.classes[:3])} "
                f"...; these data have {len(classes)}, {', '.join(classes[:3])} ...; give a teacher of the same classes"
            )
        for field in ("image_size", "mean", "std"):
            theirs, ours = getattr(config.data, field), getattr(data, field)
            if theirs != ours:
                raise ConfigError(
                    f"loss.outside_teachers has {self.name}, which was trained with data.{field} {theirs}, and here it is "
                    f"{ours}; both networks see the same images, so set the same, or give another teacher"
                )


def _source(name: str) -> _Run | None:
    """The run that a teacher is; None for a network of a library or of one's own code."""
    if is_address(name):
        return _Run(name)
    return None if ":" in name or name.startswith(("timm/", "torchvision/", "transformers/")) else _Run(name)


def _load(name: str, config: Config, classes: Sequence[str]) -> nn.Module:
    if _source(name):
        log.info("loss.outside_teachers: %s teaches as of %s", name, checkpoint.find(name).name)
        return checkpoint.load_model(name)
    try:
        network = network_of_library(name, len(classes), config.data.image_size).eval()
    except ConfigError as error:
        raise ConfigError(f"loss.outside_teachers: {error}") from None
    with torch.no_grad():
        given = _last(network(torch.zeros(1, 3, config.data.image_size, config.data.image_size)))
    if given.shape != (1, len(classes)):
        raise ConfigError(
            f"loss.outside_teachers has {name}, which gives {list(given.shape)} for one image; it must be [1, {len(classes)}], "
            "a logit per class of these data"
        )
    return network


def _last(output: object) -> Tensor:
    """The logits in what a network gives: the last exit's, or those of a transformers output."""
    output = getattr(output, "logits", output)
    last = output[-1] if isinstance(output, tuple | list) else output
    assert isinstance(last, Tensor), f"a teacher gives a {type(last).__name__}"
    return last
