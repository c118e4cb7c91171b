"""``dist-train export``: a trained network as a folder that predicts, and stops early, without torch."""

from __future__ import annotations

from typing import get_args

from dist_train.arguments import Parser
from dist_train.commands.policy import add_policy_options, chosen_point
from dist_train.errors import ConfigError
from dist_train.export.formats import MAX_CHANGED, Form, Format, Precision


def run(arguments: list[str]) -> int:
    """Export, and say where to."""
    known = _parser().parse_args(arguments)
    point = chosen_point(known)
    if point is None:
        raise ConfigError(
            f"no thresholds are given; give --budget or --risk (of the report of `dist-train eval {known.run}`), or --thresholds"
        )
    if known.max_changed is None:
        known.max_changed = MAX_CHANGED
    elif known.precision == "fp32" or not 0 <= known.max_changed <= 1:
        raise ConfigError(
            f"--max-changed is {known.max_changed:g}; give a share of the images from 0 to 1, such as 0.1, and a lower --precision than fp32"
        )
    if known.register is not None and not known.mlflow:
        raise ConfigError("--register is for a model of MLflow; give it with --mlflow, or leave it out")
    from dist_train.export.programs import check_installed

    # First, because the exporter imports the runner, which ends the process where onnxruntime is missing.
    check_installed(known.format)
    from dist_train.export.export import export

    chosen = (known.run, point, Form(known.format, known.precision, known.max_changed), known.out, known.shards)
    if known.mlflow:
        from dist_train.export.mlflow_model import export_model, log_model

        folder = export_model(*chosen)
        print(f"exported to {folder}; serve it with: mlflow models serve --env-manager local -m {folder}")
        print(log_model(known.run, folder, known.register))
        return 0
    if known.triton:
        from dist_train.export.triton_repository import export_repository

        folder = export_repository(*chosen)
        print(f"exported to {folder}; serve it with: tritonserver --model-repository={folder}")
        return 0
    folder = export(*chosen)
    print(f"exported to {folder}; its README.md says what was measured")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "dist-train export",
        description="Write a folder that predicts without torch: one program per exit, policy.json, and predict.py, which "
        "needs numpy, Pillow and the runtime. Before the folder gets its name, the programs are compared with the network on "
        "1,000 images of data.val.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder (its best checkpoint), or one of its checkpoints")
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="onnx",
        help="onnx: a program per exit, for any number of images (default); onnx-if: one graph that stops by itself, an image at a time; "
        "openvino: a program per exit for OpenVINO",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="int8: quantised, by the ranges of activations on 128 images of data.val, for ONNX Runtime; bf16 and fp16: for OpenVINO, "
        "where the CPU has them (default: fp32)",
    )
    parser.add_argument(
        "--max-changed",
        type=float,
        metavar="SHARE",
        help="share of the compared images that a lower precision than fp32 may give another class or exit; more is an error "
        f"(default: {MAX_CHANGED})",
    )
    add_policy_options(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--mlflow",
        action="store_true",
        help="write the folder as a model of MLflow, and log it to the run's MLflow run (default folder: mlflow-model in the run folder)",
    )
    parser.add_argument(
        "--register", metavar="NAME", help="with --mlflow: make it the next version of this registered model as well"
    )
    kind.add_argument(
        "--triton",
        action="store_true",
        help="write a model repository of Triton Inference Server (default folder: triton in the run folder)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder to write (default: export in the run folder)")
    parser.add_argument("--shards", metavar="FOLDER", help="folder of the shards (default: the run's)")
    return parser
