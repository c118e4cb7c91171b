"""The command line: `dist-train VERB CONFIG [--section.key value]`; parsing and printing only."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dist_train.arguments import Parser
from dist_train.errors import ConfigError, TrainingError, UserError

STOPPED = 75
"""Exit code of a run that was asked to stop and has saved: the same command goes on (EX_TEMPFAIL of sysexits.h)."""

BENCHES = ("compare", "data", "eval", "loss", "model", "order", "shards", "start", "step")
"""What `bench` can measure: each is a module of dist_train.bench with a function run(arguments), which gives the exit code."""

DESCRIPTION = """\
Distributed training of multi-exit image classifiers by distillation.

  dist-train plan CONFIG     what a run would do: costs, steps, memory, learning rate, data; trains nothing
  dist-train train CONFIG    train; the same command again goes on where it ended
  dist-train eval RUN        accuracy of every exit and at every budget, each image once; a report
  dist-train compare RUN RUN put runs side by side: settings, accuracy per exit, cost, curves
  dist-train study STUDY     train a grid of runs, go on where it ended, and compare them
  dist-train sync RUN        send MLflow what it missed of a run while its server was away
  dist-train predict RUN IMAGES...   class, confidence and exit of image files, stopping early
  dist-train convert FILE OUTPUT     a public MSDNet checkpoint as one of ours
  dist-train bench WHAT      measure this machine: compare, data, eval, loss, model, order, shards, start, step
  dist-train doctor          what is installed and what this machine can do

Any field of CONFIG can be overridden: --section.key value.  `dist-train train --help` lists them.
Several processes: python -m launch.local -n 2 CONFIG; on a cluster: python -m launch.slurm --nodes 4 CONFIG
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb; errors that a user can mend are one line and exit code 2."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one verb and return the exit code."""
    verbs: dict[str, Callable[[list[str]], int]] = {
        "plan": _plan, "train": _train, "eval": _eval, "predict": _predict, "convert": _convert, "compare": _compare,
        "study": _study, "sync": _sync, "bench": _bench, "doctor": _doctor,
    }  # fmt: skip
    if not arguments or arguments[0] in ("-h", "--help"):
        print(DESCRIPTION, end="")
        return 0
    # The deepspeed launcher adds its own argument in front of the script's.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    verb, *rest = arguments
    try:
        if verb not in verbs:
            raise UserError(f"unknown verb '{verb}'; use one of {', '.join(verbs)}")
        return verbs[verb](rest)
    except UserError as error:
        _say(verb, error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


def _say(verb: str, error: UserError) -> None:
    """Print an error once: by rank 0 what all ranks find, and by its own rank what only one can have found in training."""
    rank, torch = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")), sys.modules.get("torch")
    alone = torch is not None and torch.distributed.is_initialized() and not isinstance(error, TrainingError)
    if rank == "0" or alone:
        print(f"dist-train {verb}: {f'rank {rank}: ' if alone else ''}{error}", file=sys.stderr)


def _plan(arguments: list[str]) -> int:
    parser = _parser("plan", "Say what a run would do, without training.", fields=True)
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes (GPUs) to plan for")
    known, overrides = parser.parse_known_args(arguments)
    from dist_train.config_file import load_config
    from dist_train.planner import plan

    if known.processes < 1:
        raise ConfigError(f"--processes is {known.processes}; it must be at least 1")
    result = plan(load_config(known.config, *overrides), world_size=known.processes)
    print(result)
    return 2 if result.problems else 0


def _train(arguments: list[str]) -> int:
    parser = _parser("train", "Train, or go on with the run of the same name.", fields=True)
    known, overrides = parser.parse_known_args(arguments)
    from dist_train.config_file import load_config

    config = load_config(known.config, *overrides)
    from dist_train.trainer import train

    result = train(config)
    return 0 if result.finished else STOPPED


def _eval(arguments: list[str]) -> int:
    parser = Parser(
        "dist-train eval",
        description="Accuracy of every exit, each image of a split once, and at any budget; writes report.json, report.html "
        "and report/ into the run folder and to MLflow. Several processes: torchrun --nproc-per-node 2 -m dist_train eval RUN",
    )
    parser.add_argument(
        "run", metavar="RUN", help="run folder (its best checkpoint), a checkpoint, or a folder of weights"
    )
    parser.add_argument("--split", help="split of the shards (default: the run's data.val)")
    parser.add_argument("--shards", metavar="FOLDER", help="folder of the shards (default: the run's)")
    parser.add_argument(
        "--calibration", metavar="SPLIT", help="split that thresholds are fitted on (default: data.val where another split "
        "is tested, else half of the split, as many images of every class)",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", metavar="B,B,...", help="average multiply-adds per image to show, such as 12e6,2e7"
    )
    parser.add_argument("--clamp", action="store_true", help="move budgets out of range to its ends")
    parser.add_argument("--milliseconds", action="store_true", help="also budgets in measured time, an image at a time")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write to (default: the run folder)")
    known = parser.parse_args(arguments)
    from dist_train.dist import Ranks
    from dist_train.report.evaluate import evaluate
    from dist_train.report.output import check_writable, log_to_run, parse_budgets, summary, write

    budgets = parse_budgets(known.budgets)
    check_writable(known.run, known.out)
    if known.clamp and not budgets:
        raise ConfigError("--clamp is for --budgets; give both")
    report = evaluate(known.run, known.split, known.shards, known.calibration, known.milliseconds, budgets, known.clamp)
    shown = report.budgeted(budgets, clamp=known.clamp) if budgets else None
    if Ranks.from_env().rank == 0:
        print(summary(report, shown))
        files = write(report, known.out)
        print("\n".join(log_to_run(report, files, known.out)))
    return 0


def _sync(arguments: list[str]) -> int:
    parser = Parser(
        "dist-train sync", description="Send MLflow what it does not have yet of a run; again, it changes nothing."
    )
    parser.add_argument("run", type=Path, help="run folder")
    known = parser.parse_args(arguments)
    from dist_train.tracking import sync

    result = sync(known.run)
    print(f"{known.run}: {result.lines} lines sent; MLflow at {result.uri} has run {result.run_id}, {result.status}")
    return 0


def _compare(arguments: list[str]) -> int:
    from dist_train.compare.command import run

    return run(arguments)


def _study(arguments: list[str]) -> int:
    from dist_train.study import run

    return run(arguments)


def _predict(arguments: list[str]) -> int:
    parser = Parser(
        "dist-train predict", description="Classify image files; every image stops at the exit that is sure of it."
    )
    parser.add_argument("run", metavar="CHECKPOINT", help="run folder (its best checkpoint), or one of its checkpoints")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or folders of them")
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument(
        "--thresholds", metavar="T,T,...", help="stop at the first exit whose confidence reaches its threshold"
    )
    policy.add_argument("--patience", type=int, metavar="N", help="stop when N exits in a row kept the predicted class")
    policy.add_argument(
        "--budget", metavar="B", help="thresholds of report.json for a cost per image: 12e6, 12M, 3.5ms"
    )
    policy.add_argument("--exit", type=int, metavar="N", help="stop at exit N (default: the last)")
    parser.add_argument("--measure", choices=("max_probability", "entropy", "margin"),
                        help="what --thresholds are compared with (default: max_probability)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images computed together (default: 1)")
    parser.add_argument("--output", metavar="CSV", help="write one line per image there instead of printing it")
    known = parser.parse_args(arguments)
    from dist_train.predict_files import predict_files

    predict_files(known)
    return 0


def _convert(arguments: list[str]) -> int:
    parser = Parser(
        "dist-train convert",
        description="Turn a checkpoint of a public MSDNet repository into a folder that eval, predict and load_model read.",
        epilog="Any field of the configuration can be given: --data.mean '[0.49, 0.48, 0.45]', --data.shards data/cifar100.",
    )
    parser.add_argument(
        "file", metavar="FILE", help="their checkpoint: a torch file, read with weights_only, or safetensors"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to make")
    parser.add_argument("--repository", required=True, choices=("msdnet_pytorch", "multiexit_distillation"))
    parser.add_argument("--arguments", required=True, metavar="YAML", help="the network's configuration by their names")
    known, overrides = parser.parse_known_args(arguments)
    from dist_train.models.convert import convert

    print(convert(known.file, known.output, known.repository, known.arguments, *overrides))
    return 0


def _bench(arguments: list[str]) -> int:
    parser = Parser(
        "dist-train bench",
        usage="dist-train bench WHAT [--json PATH ...]",
        description="Measure this machine; dist-train bench WHAT --help says what is measured, and how it can be changed.",
    )
    parser.add_argument("what", metavar="WHAT", choices=BENCHES, help=", ".join(BENCHES))
    known = parser.parse_args(arguments[:1])
    status: int = importlib.import_module(f"dist_train.bench.{known.what}").run(arguments[1:])
    return status


def _doctor(arguments: list[str]) -> int:
    parser = Parser("dist-train doctor", description="Say what is installed and what this machine can do.")
    parser.parse_args(arguments)
    from dist_train.doctor import examine

    lines, healthy = examine()
    print("\n".join(lines))
    return 0 if healthy else 1


def _parser(verb: str, description: str, fields: bool) -> argparse.ArgumentParser:
    epilog = None
    if fields and {"-h", "--help"} & set(sys.argv):
        epilog = "fields of CONFIG, each an override --section.key value:\n" + _field_help()
    parser = Parser(
        f"dist-train {verb}",
        usage=f"dist-train {verb} CONFIG [--section.key value ...]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    return parser


def _field_help() -> str:
    from dist_train.config_file import describe_fields

    lines = []
    for key, default, text in describe_fields():
        lines.append(f"  --{key}  ({default})")
        lines += textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
