"""The launches: what ``dist_train::exit_loss`` runs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.loss.gpu import LANES, SUMS, finish_kernel, scale_kernel, width
from dist_train.loss.gpu_general import general_kernel
from dist_train.loss.gpu_single_pass import single_pass_kernel
from dist_train.loss.inputs import ExitWeights, LossOptions, Targets, grad_scale
from dist_train.loss.statistics import ExitStats

WARPS_PER_SM = 8
"""What fits at 255 registers."""


def exit_loss_gpu(
    logits: Sequence[Tensor], targets: Targets, exits: ExitWeights, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`dist_train.loss.operator`; nothing here waits for the GPU."""
    num_exits, (samples, classes), device = len(logits), logits[0].shape, logits[0].device
    # Exits side by side in a sample: their distances are then known when the kernel is compiled, which saves registers.
    grads = logits[0].new_empty((samples, num_exits, classes) if options.with_grad else (0, 0, 0))
    if samples == 0:
        return torch.zeros((), device=device), ExitStats.zeros(num_exits, device).vector, grads.transpose(0, 1)
    loss, vector = torch.empty((), device=device), torch.empty(ExitStats.size(num_exits), device=device)
    # Contiguous, as networks give them: the stride is then known when the kernel is compiled, and so is the alignment.
    rows = tuple(z.contiguous() for z in logits)
    targets = Targets(*(None if t is None else t.contiguous() for t in targets))  # type: ignore[arg-type]
    kernel, constants = choose_kernel(num_exits, classes, targets, options)
    # As many as run at once, each with many samples.  Its sums stay in registers and go to rows of its own, not into atomics,
    # whose order would make the last digits differ from run to run.
    programs = min(samples, _num_sms(device) * WARPS_PER_SM // constants["num_warps"])
    partials = torch.empty((programs, SUMS.value, width(num_exits)), device=device)
    # Triton launches on the current device, which need not be that of the logits.
    with torch.cuda.device_of(logits[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](
            rows,
            targets,
            exits,
            partials,
            grads if options.with_grad else None,
            samples,
            grad_scale(logits[0].dtype, samples),
            M=num_exits,
            K=classes,
            **constants,
        )
        # A single program, so that the order of the sum is fixed: each of its 512 threads holds 8 numbers of each sum.
        finish_kernel[(1,)](
            partials,
            exits,
            vector,
            loss,
            samples,
            programs,
            M=num_exits,
            CROSS_ENTROPY=options.cross_entropy,
            BLOCK=4096 // width(num_exits),
            num_warps=16,
        )
    return loss, vector, grads.transpose(0, 1)


def scale_gradients_gpu(gradients: Tensor, factor: Tensor) -> None:
    """Multiply gradients [M, N, K], as :func:`exit_loss_gpu` gives them, by ``factor`` [] without waiting for it."""
    with torch.cuda.device_of(gradients):  # type: ignore[no-untyped-call]
        # [N, M, K], as the kernels wrote it: contiguous, so that it can be walked through as one range.
        scale_kernel[(_num_sms(gradients.device) * 8,)](
            gradients.transpose(0, 1), factor, gradients.numel(), BLOCK=2048
        )


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_kernel(num_exits: int, classes: int, targets: Targets, options: LossOptions) -> tuple[Any, dict[str, Any]]:
    """The kernel for this objective, with its compile-time constants and options.

    A warp has up to 1024 classes in registers, 32 in each thread; with more warps per sample, sums need barriers.
    """
    block = 1 << (classes - 1).bit_length()
    # The single pass keeps the classes of a row in registers; it has code for rules, and none for a matrix.
    if (
        not targets.labels.is_floating_point()
        and options.rule != "matrix"
        and num_exits <= LANES.value
        and block <= 4096
    ):
        objective = (options.rule, options.smoothing)
        constants = {"OBJECTIVE": objective, "BLOCK_K": block, "num_warps": max(1, block // 1024)}
        return single_pass_kernel, constants | _compiler_options(more_registers=True)
    # The matrix holds the weights of any teachers.
    rule = "matrix" if options.rule == "ensemble" else options.rule
    threads = 32 if classes <= 4096 else 128
    # Classes that a thread has at a time: 8 are 16 bytes in bf16 and fp16, but a matrix takes registers for every exit.
    per_thread = 8 if num_exits <= (5 if rule == "matrix" else 7) and classes % 8 == 0 else 4
    if rule == "matrix" and num_exits > 11:
        per_thread = 2
    constants = {
        "OBJECTIVE": (rule, options.smoothing),
        "BLOCK_K": threads * per_thread,
        "THREADS": threads,
        "num_warps": threads // 32,
    }
    return general_kernel, constants | _compiler_options(more_registers=num_exits > 5)


def _compiler_options(more_registers: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"enable_fp_fusion": True}  # from Triton 3.10 on the default is to multiply and add apart
    if more_registers and torch.version.hip is None:
        options["maxnreg"] = 255  # ptxas would rather spill for the sake of more warps at a time
    return options
