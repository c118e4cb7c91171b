"""A kernel compiled for a GPU that is not here, and the instructions that a warp issues for one sample."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_train.loss.gpu_launch import choose_kernel
from dist_train.loss.inputs import ExitWeights, LossOptions, Targets

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Kernel(NamedTuple):
    """What a compiled kernel needs."""

    name: str
    registers: int
    stack: int
    per_sample: Counter[str]
    """Instructions of a sample, by name: of one with finite logits, and no tie that matters."""
    code: int
    """Bytes of machine code."""


def compile_kernel(path, exits, classes, dtype, rule="last", smoothing=0.0, targets="labels", architecture=90):
    """Compile the kernel that the operator would choose, for pointers aligned to 16 bytes; ``path`` is for its cubin."""
    labels, floats = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    given, kinds = {
        "labels": (Targets(labels), Targets("*i64")),
        "weighted": (Targets(labels, weights=floats), Targets("*i64", weights="*fp32")),
        "mix": (Targets(labels, labels, floats), Targets("*i64", "*i64", "*fp32")),
        "soft": (Targets(floats[None]), Targets("*fp32")),
    }[targets]
    kernel, settings = choose_kernel(exits, classes, given, LossOptions(rule, smoothing))
    options = {name: settings.pop(name) for name in ("num_warps", "maxnreg", "enable_fp_fusion") if name in settings}
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | {
        "logits": (f"*{dtype}",) * exits,
        "targets": Targets(*(kind or "constexpr" for kind in kinds)),
        "exits": ExitWeights(*["*fp32"] * 6),
        "partials": "*fp32",
        "grads": f"*{dtype}",
        "samples": "i32",
        "grad_scale": "i32",
    }
    constants = settings | {"M": exits, "K": classes}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    constants |= {(kernel.arg_names.index("targets"), i): None for i, kind in enumerate(kinds) if kind is None}
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for place, kind in enumerate(signature.values()):
        inner = kind if isinstance(kind, tuple) else [kind]
        paths = [(place, i) for i in range(len(inner))] if isinstance(kind, tuple) else [(place,)]
        attributes |= {key: aligned for key, one in zip(paths, inner) if one.startswith("*")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    path.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # The single pass loops over the exits before the last one, the general kernel over parts of the classes.
    trips = -(-classes // settings["BLOCK_K"]) if "THREADS" in settings else exits - 1
    text = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    return Kernel(kernel.fn.__name__, registers, stack, count_sample(text, trips), code_bytes(text))


def code_bytes(text):
    """Bytes of disassembled machine code: 16 for each instruction of an H100, those that only fill it up included."""
    return 16 * len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s", text, re.MULTILINE))


def count_sample(text, trips):
    """Instructions on the shortest way through the loop over samples, whose inner loops run ``trips`` times.

    Branches lead to what is rare: ties, masked classes, logits that are not finite.
    """
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)\s*(.*?);", line):
            instructions.append(found.groups())
    jumps = {}  # place of a branch: where it leads, and whether it may not be taken
    for place, (predicate, name, operands) in enumerate(instructions):
        if name == "BRA" and (target := re.search(r"\.L_x_\d+", operands)):
            jumps[place] = (labels[target[0]], bool(predicate) or re.match(r"!?U?P\d", operands) is not None)
    loops = [(target, place) for place, (target, _) in jumps.items() if target < place]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in loops if first < loop[0] and loop[1] < last]
    weight = [trips if any(a <= place <= b for a, b in inner) else 1 for place in range(last + 1)]

    distance, before = {first: 0}, {}
    for place in range(first, last):
        if place not in distance:
            continue
        target, may_go_on = jumps.get(place, (None, True))
        ways = [place + 1] if may_go_on or target <= place else []
        if target is not None and target > place:
            ways.append(target)
        for way in ways:
            if distance[place] + weight[place] < distance.get(way, 1 << 30):
                distance[way], before[way] = distance[place] + weight[place], place
    counts: Counter[str] = Counter()
    place = last
    while True:
        counts[instructions[place][1]] += weight[place]
        if place == first:
            return counts
        place = before[place]
