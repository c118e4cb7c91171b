"""``dist-train bench compare``: how long a comparison of many runs takes, from their folders and from MLflow."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from dist_train.arguments import Parser, positive
from dist_train.bench import writable
from dist_train.commands import compare as command
from dist_train.config_file import dump_config, flat_fields, load_config, make_config
from dist_train.tracking.metrics import read_metrics

METRICS = [f"train/exit{number}/{name}" for number in range(1, 6) for name in ("loss", "top1", "top5")] + [
    "train/loss",
    "train/temperature",
    "train/learning_rate",
    "val/mean_top1",
    "speed/images_per_second",
]


def run(arguments: list[str]) -> int:
    """Make runs with synthetic metrics, compare them both ways, print (and with --json write) the seconds."""
    parser = Parser("dist-train bench compare", description="Time a comparison of many runs.")
    parser.add_argument("--runs", type=positive, default=100, help="runs to compare (100)")
    parser.add_argument("--points", type=positive, default=10_000, help="metric points of each run (10000)")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the numbers here")
    known = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = [_make(root, number, known.points // len(METRICS)) for number in range(known.runs)]
        uri = _fill_store(root, folders)
        seconds = {
            "folders": _time([*map(str, folders), "--out", str(root / "a"), "--no-track"]),
            "mlflow": _time(["--uri", uri, "--experiment", "bench", "--out", str(root / "b"), "--no-track"]),
        }
        same = (root / "a" / "accuracy.csv").read_bytes() == (root / "b" / "accuracy.csv").read_bytes()
    result = {"runs": known.runs, "points": known.points, "seconds": seconds, "same_result": same}
    for source, value in seconds.items():
        print(f"{known.runs} runs of {known.points} points from {source}: {value:.2f} s")
    if known.json:
        known.json.write_text(json.dumps(result, indent=1))
    return 0 if same else 1


def _make(root: Path, number: int, lines: int) -> Path:
    """One of five seeds of a run; twenty mixes for a hundred runs."""
    tree = {"name": f"run{number}", "runs": str(root / "runs"), "seed": number % 5, "data": {"shards": "data/x"}}
    config = make_config({**tree, "loss": {"alpha": (number // 5) / 100 % 1}})
    config.folder.mkdir(parents=True)
    (config.folder / "config.yaml").write_text(dump_config(config))
    with (config.folder / "metrics.jsonl").open("w") as file:
        for line in range(1, lines + 1):
            metrics = {metric: math.exp(-line / lines) + place for place, metric in enumerate(METRICS)}
            file.write(json.dumps({"t": 1000 * line, "step": 20 * line, "batch": 20 * line, "metrics": metrics}) + "\n")
    exits = [
        {
            "exit": n,
            "multiply_adds": n * 10**6,
            "parameters": n,
            "top1": n / 10 + number / 1e4,
            "top5": 1.0,
            "loss": 1.0,
        }
        for n in range(1, 6)
    ]
    report = {"format": 1, "step": 20 * lines, "images": 1000, "unreadable": 0, "exits": exits}
    (config.folder / "report.json").write_text(json.dumps(report))
    return config.folder


def _fill_store(root: Path, folders: list[Path]) -> str:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{root / 'mlflow.db'}"
    client: Any = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("bench", artifact_location=(root / "artifacts").as_uri())
    for folder in folders:
        run_id = client.create_run(experiment, run_name=folder.name).info.run_id
        fields = flat_fields(load_config(folder / "config.yaml"))
        client.log_batch(run_id, params=[Param(key, value) for key, value in fields.items()])
        points = [
            Metric(key, value, entry["t"], entry["step"])
            for entry in read_metrics(folder / "metrics.jsonl")
            for key, value in entry["metrics"].items()
        ]
        # MLflow takes at most 1,000 metrics in one request.
        for start in range(0, len(points), 1000):
            client.log_batch(run_id, metrics=points[start : start + 1000])
        client.log_artifact(run_id, str(folder / "report.json"))
    return uri


def _time(arguments: list[str]) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        command.run(arguments)
    return time.perf_counter() - start
