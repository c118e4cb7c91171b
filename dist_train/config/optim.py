"""The sections ``optim`` and ``train``: optimizer, batches, length, precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from dist_train.config.base import Positive, Section, Unit


class OptimConfig(Section):
    """Optimizer, learning rate and weight averaging."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd (with momentum) or adamw."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate, for the global batch as configured."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Nesterov momentum (sgd)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the two moments (adamw)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Term added to the denominator (adamw)."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay."""
    decay_all: bool = False
    """Decay the parameters of norms and biases too, as the authors' recipe does."""
    schedule: Literal["multistep", "cosine", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    milestones: tuple[Unit, ...] = (0.5, 0.75)
    """Milestones of multistep, as fractions of all steps."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of the learning rate at each milestone."""
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    """Final learning rate of cosine, as a fraction of lr."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Clip the global gradient norm to this (default: no clipping)."""
    exit_gradients: Literal["sum", "equilibrium", "equilibrium_coarsest", "pcgrad"] = "sum"
    """How the exits' gradients meet in the parameters that they share: sum; equilibrium, their mean (Li et al., 2019); equilibrium_coarsest, the same on the coarsest scale of an msdnet alone; or pcgrad, their sum without what points against another exit (Yu et al., 2020), at ZeRO stage 0."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of the averaged (EMA) weights, for instance 0.999 (default: none)."""

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones are {list(self.milestones)}; they must rise")
        if self.nesterov and self.name == "sgd" and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; set momentum, or nesterov: false")
        return self


class TrainConfig(Section):
    """Batches, length, precision and the distributed engine."""

    epochs: Positive = 100
    """Passes over the training split."""
    global_batch: Positive = 64
    """Images per update, over all processes."""
    micro_batch: Positive = 64
    """Images per forward pass of one process; the gradient accumulation steps follow from it."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 are autocast with float32 weights; fp16 also has a dynamic loss scale."""
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage: what is partitioned over the processes (0 nothing, 1 optimizer state, 2 also gradients, 3 also weights); auto is 1 with several processes and at least 1 GiB of optimizer state, else 0."""
    channels_last: bool = True
    """Activations in NHWC, which convolutions in bf16 prefer, instead of NCHW."""
    sync_bn: bool = False
    """Synchronize batch-norm statistics over all processes (GPU only)."""
    compile: bool = False
    """Compile the network with torch.compile."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Replay the network's forward and backward pass as CUDA graphs, at ZeRO 0: the host launches small operators more slowly than a GPU computes them; auto: with msdnet and resnet."""
    deterministic: bool = False
    """Deterministic algorithms alone, so that a run on GPUs can be repeated bit for bit; slower. On a CPU it is without."""
    eval_every: Positive = 1
    """Epochs between validations; the last epoch is always validated."""
    max_steps: Positive | None = None
    """Stop after this many updates; the learning rate still follows the whole length."""
