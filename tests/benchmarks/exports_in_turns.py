"""The time to each exit of a network in every form that it can be exported in.

    python tests/benchmarks/exports_in_turns.py CONFIG [REPEATS]

A network of the configuration with fresh weights, an image at a time, one thread.  Processor time, which other processes disturb
less, in turns; medians in milliseconds, half of the distance between the quartiles, and the ratio to the stages in float32.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dist_train.config_file import load_config
from dist_train.evaluation.thresholds import OperatingPoint
from dist_train.export import policy as policies
from dist_train.export.export import _write
from dist_train.export.formats import open_export
from dist_train.export.openvino_runtime import has_precision
from dist_train.export.parity import leaving_at
from dist_train.models import build_model
from dist_train.prediction import Thresholds
from dist_train.prediction.shares import Reference

KINDS = [("onnx", "fp32"), ("onnx-if", "fp32"), ("onnx", "int8"), ("openvino", "fp32")]
KINDS += [("openvino", precision) for precision in ("bf16", "fp16") if has_precision(precision)]


def main(config_file, repeats=50):
    config = load_config(config_file)
    size, classes = config.data.image_size, 1000 if config.data.image_size > 64 else 10
    torch.manual_seed(0)
    staged = build_model(config.model, classes, size).eval().staged(size)
    policy = Thresholds([0.5] * (staged.num_exits - 1))
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        networks = {}
        for format_, precision in KINDS:
            kind = f"{format_} {precision}"
            folder = Path(root) / kind
            folder.mkdir()
            images = random.standard_normal((8, 3, size, size), dtype=np.float32) if precision == "int8" else None
            programs = _write(staged, size, policy, folder, format_, images) | {"precision": precision}
            point = OperatingPoint(policy, Reference([], 0), {})
            names = [str(number) for number in range(classes)]
            policies.write(folder, policies.content(point, [0] * staged.num_exits, names, config, 0, programs))
            networks[kind] = open_export(folder, threads=1)
        image = random.standard_normal((1, 3, size, size), dtype=np.float32)
        times = {(kind, exit_): [] for exit_ in range(staged.num_exits) for kind in networks}
        for round_ in range(repeats + 1):
            for (kind, exit_), taken in times.items():
                networks[kind].thresholds = leaving_at(exit_, staged.num_exits)
                start = time.process_time()
                assert networks[kind].predict(image).exits == exit_ + 1
                if round_:
                    taken.append(1000 * (time.process_time() - start))
    rows = []
    for exit_ in range(staged.num_exits):
        found = {}
        for kind in networks:
            low, middle, high = statistics.quantiles(times[kind, exit_], n=4)
            found[kind] = [round(middle, 3), round((high - low) / 2, 3)]
            found[kind].append(round(middle / found["onnx fp32"][0], 2))
        rows.append({"exit": exit_ + 1, **found})
    print("\n".join(map(json.dumps, rows)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
