"""The time to each exit of one ONNX graph that stops by itself, beside the same network as a program per exit.

    python tests/benchmarks/graph_beside_stages.py CONFIG [REPEATS]

A network of the configuration with fresh weights, an image at a time, one thread.  Processor time, which other processes disturb
less, in turns; medians in milliseconds, half of the distance between the quartiles, and the ratio of the medians.
"""

import json
import shutil
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
from dist_train.export import runner
from dist_train.export.parity import leaving_at
from dist_train.export.programs import write_programs
from dist_train.export.runner import EarlyExit
from dist_train.export.single_graph import write_single_graph
from dist_train.models import build_model
from dist_train.prediction import Thresholds
from dist_train.prediction.shares import Reference


def main(config_file, repeats=50):
    config = load_config(config_file)
    size, classes = config.data.image_size, 1000 if config.data.image_size > 64 else 10
    torch.manual_seed(0)
    staged = build_model(config.model, classes, size).eval().staged(size)
    policy = Thresholds([0.5] * (staged.num_exits - 1))
    with tempfile.TemporaryDirectory() as root:
        networks = {}
        for kind in ("stages", "graph"):
            folder = Path(root) / kind
            folder.mkdir()
            if kind == "stages":
                programs = {"stages": write_programs(staged, size, folder)}
            else:
                programs = {"graph": write_single_graph(staged, policy, size, folder)}
            point = OperatingPoint(policy, Reference([], 0), {})
            names = [str(number) for number in range(classes)]
            policies.write(folder, policies.content(point, [0] * staged.num_exits, names, config.data, 0, programs))
            shutil.copyfile(runner.__file__, folder / "predict.py")
            networks[kind] = EarlyExit(folder, threads=1)
        image = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
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
        rows.append({"exit": exit_ + 1, **found, "ratio": round(found["graph"][0] / found["stages"][0], 2)})
    print("\n".join(map(json.dumps, rows)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
