"""The section ``model``: which network, as a union over the kinds of networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from dist_train.config.base import Natural, Positive, Section, Unit, UserPath


class NetworkConfig(Section):
    """What every multi-exit network has."""

    pretrained: bool | UserPath | None = None
    """Weights to start from: a file (safetensors, or torch's without code), or true for the library's own; exits may be missing."""
    regime: Literal["joint", "disjoint", "mixed", "heads_only", "heads_first"] = "joint"
    """What trains. joint: everything; disjoint: the network by its last exit, then the other exits on it; mixed: the network by its last exit, then everything; heads_only: the exits on a pretrained network; heads_first: the same, then everything."""
    first_epochs: Natural = 0
    """Epochs of the first stage of disjoint, mixed and heads_first; the learning rate's schedule runs once in every stage."""
    ensemble: Literal["geometric", "arithmetic", "product", "boosted"] | None = None
    """How an exit predicts: by itself (null), or together with all exits before it: by the mean of their logits (geometric), the mean of their probabilities (arithmetic), the sum of their logits (product), or the same with the earlier ones as constants (boosted)."""

    @field_validator("pretrained", mode="before")
    @classmethod
    def _check_pretrained(cls, given: Any) -> Any:
        # Booleans of YAML 1.1, which would be read as the names of files.
        if given in ("on", "off", "yes", "no"):
            raise ValueError(f"is '{given}'; write true, false, or a file such as ./{given}")
        if given is not None and not isinstance(given, bool | str | Path):
            raise ValueError(f"is {given!r}; write true, false, or the name of a file")
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        staged = self.regime in ("disjoint", "mixed", "heads_first")
        if staged != bool(self.first_epochs):
            raise ValueError(
                f"regime is {self.regime} and first_epochs is {self.first_epochs}; {self.regime} needs "
                + ("1 or more" if staged else "none")
            )
        if self.ensemble and self.regime in ("disjoint", "mixed"):
            raise ValueError(
                f"ensemble is {self.ensemble} and regime {self.regime}, whose first stage trains the last exit alone; use "
                "another regime, or leave ensemble out"
            )
        if self.regime in ("heads_only", "heads_first") and not self.pretrained:
            raise ValueError(
                f"regime is {self.regime}, which trains exits on a network that stays as it is, and pretrained is not set; "
                "give pretrained, or use the regime disjoint or mixed, which train the network first"
            )
        if self.pretrained is True and not isinstance(self, LibraryConfig):
            raise ValueError(
                "pretrained is true, which needs a network of a library (timm, torchvision, transformers); give a file"
            )
        return self


# Every layer takes time and memory to be built, so that a number that was mistyped would end in neither a run nor an error.
Layers = Annotated[int, Field(ge=1, le=100)]


class MSDNetConfig(NetworkConfig):
    """A multi-scale dense network, which has exits of its own."""

    name: Literal["msdnet"] = "msdnet"
    """msdnet, resnet, timm/NAME, torchvision/NAME, transformers/CONFIG_CLASS or /MODEL, or module:function, your own f(num_classes)."""
    exits: Annotated[int, Field(ge=1, le=16)] = 7
    """Number of exits (msdnet); for other networks the submodules to attach exits to, the network's end being one more exit."""
    scales: Annotated[int, Field(ge=1, le=8)] = 3
    """Number of scales, each of half the width and height of the one before."""
    growth: Positive = 6
    """Channels that a layer adds, times the scale's growth factor."""
    growth_factors: tuple[Positive, ...] = (1, 2, 4)
    """Factor of growth and initial_channels per scale, finest first."""
    bottleneck_factors: tuple[Positive, ...] | None = (1, 2, 4)
    """Largest width of a 1x1 bottleneck per scale, times the channels of the 3x3 after it (null: no bottlenecks)."""
    initial_channels: Positive = 16
    """Channels after the stem, times the scale's growth factor."""
    base: Layers = 4
    """Layers before the first exit."""
    step: Layers = 2
    """Layers from one exit to the next."""
    step_mode: Literal["even", "growing"] = "even"
    """even: step layers between all exits; growing: step + 1, 2 step + 1, 3 step + 1, ..."""
    prune: Literal["min", "max", "none"] = "max"
    """When fine scales end: max one after each S-th of the layers, min in the last layers, none never."""
    reduction: Unit = 0.5
    """Fraction of the channels that a transition keeps; 0 leaves the transitions out."""
    head_width: Positive | None = 128
    """Channels inside an exit's head (null: as many as enter it)."""
    stem: Literal[32, 224] | None = None
    """Stem for images of about 32 or of about 224 pixels (null: by the image size, 224 from 96 pixels on)."""
    dialect: Literal["lua", "msdnet_pytorch", "multiexit_distillation"] = "lua"
    """Whose details are followed: the original, or one of two public PyTorch versions with their weights."""
    activation_checkpointing: bool = False
    """Keep only the activations at exits and recompute the others in the backward pass: less memory, more time."""


class AttachedConfig(NetworkConfig):
    """A network to which exits are attached."""

    exits: Annotated[tuple[str, ...], Field(min_length=1)]
    """Submodules after which exits are attached, such as [stages.0, stages.1]; the network's end is one more exit."""
    pooling: Literal["mean", "class_token"] = "mean"
    """What an exit on tokens [N, T, C] classifies: their mean, or the first."""

    @field_validator("exits", mode="before")
    @classmethod
    def _check_exits(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple):
            raise ValueError('holds no names of submodules, such as ["stages.0", "stages.1"]')
        return given


class ResNetConfig(AttachedConfig):
    """A residual network, small enough for tests and laptops."""

    name: Literal["resnet"] = "resnet"
    blocks: tuple[Layers, ...] = (2, 2, 2)
    """Residual blocks per stage; each further stage halves the image and doubles the channels."""
    width: Positive = 16
    """Channels of the first stage."""
    norm: Literal["batch", "group"] = "batch"
    """Normalization."""


class FunctionConfig(AttachedConfig):
    """A network of one's own: ``module:function``."""

    name: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the network, or fields of its configuration class."""


class LibraryConfig(FunctionConfig):
    """A network of timm, torchvision or transformers."""

    name: Annotated[str, Field(pattern=r"^(timm|torchvision|transformers)/.+$")]


NETWORKS: dict[str, type[NetworkConfig]] = {
    "msdnet": MSDNetConfig,
    "resnet": ResNetConfig,
    "library": LibraryConfig,
    "function": FunctionConfig,
}
"""The kinds of network that ``model.name`` chooses among."""


def _network_kind(model: Any) -> str | None:
    # A dict in a tree that was read, a section where one was passed in Python.
    name = model.get("name", "msdnet") if isinstance(model, dict) else getattr(model, "name", None)
    if not isinstance(name, str):
        return None
    if name in ("msdnet", "resnet"):
        return name
    if name.startswith(("timm/", "torchvision/", "transformers/")):
        return "library"
    return "function" if ":" in name else None


ModelConfig = Annotated[
    Annotated[MSDNetConfig, Tag("msdnet")]
    | Annotated[ResNetConfig, Tag("resnet")]
    | Annotated[LibraryConfig, Tag("library")]
    | Annotated[FunctionConfig, Tag("function")],
    Discriminator(
        _network_kind,
        custom_error_type="network_name",
        custom_error_message="use msdnet, resnet, timm/NAME, torchvision/NAME, transformers/NAME, or module:function",
    ),
]
"""The multi-exit network: ``name`` says which of the sections it is."""
