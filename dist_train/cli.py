"""The command line ``dist-train VERB ...``: finds the verb, and prints errors."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dist_train.errors import FAILED, INTERRUPTED, UserError

VERBS = {
    "init": "init",
    "shards": "shards",
    "plan": "plan",
    "train": "train",
    "launch": "launch",
    "eval": "evaluate",
    "predict": "predict",
    "export": "export",
    "push": "push",
    "compare": "compare",
    "study": "study",
    "watch": "watch",
    "tensorboard": "tensorboard",
    "sync": "sync",
    "convert": "convert",
    "bench": "bench",
    "doctor": "doctor",
    "schema": "schema",
}
"""Verbs, and the modules of dist_train.commands whose function run(arguments) gives the exit code."""

SLOW = ("plan", "train", "eval", "predict", "bench")
"""Verbs that import for seconds before they say anything."""

DESCRIPTION = """\
Distributed training of multi-exit image classifiers by distillation.

  dist-train init            a configuration to start from, fitted to shards
  dist-train shards make ... shards from images; also check, subset, index, info
  dist-train plan CONFIG     what a run would do: costs, steps, memory, learning rate, data; trains nothing
  dist-train train CONFIG    train; run the same command again to resume
  dist-train launch WAY CONFIG       train on several processes: local, nodes (ssh) or slurm
  dist-train eval RUN        accuracy of every exit and at every budget, each image once; a report
  dist-train compare RUN RUN compare runs: settings, accuracy per exit, cost, curves
  dist-train study STUDY     train a grid of runs (resumable) and compare them
  dist-train watch RUN       how a run is doing, until it ends: loss, exits, temperature, throughput, time left
  dist-train tensorboard RUN...      event files for TensorBoard, from what the runs have written down
  dist-train sync RUN        send MLflow what it missed of a run while its server was away
  dist-train predict RUN IMAGES...   class, confidence and exit of image files, stopping early
  dist-train export RUN      a folder of ONNX programs and a runner that stops early, without torch
  dist-train push RUN ORG/NAME       share a network on the Hugging Face Hub, with a model card
  dist-train convert FILE OUTPUT     convert a public MSDNet checkpoint
  dist-train bench WHAT      measure this machine: compare, data, eval, loss, model, order, predict, shards, start, step
  dist-train schema          the JSON schema of a configuration, for editors
  dist-train doctor          what is installed and what this machine can do

Any field of CONFIG can be overridden: --section.key value.  `dist-train train --help` lists them.
Several processes: dist-train launch local -n 2 CONFIG; on a cluster: dist-train launch slurm --nodes 4 CONFIG
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb; errors the user can fix are one line and exit code 2."""
    # For networks of one's own, `module:function`; last, so that no file there hides a library.
    sys.path.append(os.getcwd())
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one verb and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(DESCRIPTION, end="")
        return 0
    if arguments[0] == "--version":
        print(f"dist-train {importlib.metadata.version('dist-train')}")
        return 0
    # The deepspeed launcher adds its own argument in front of the script's.
    verb, *rest = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    try:
        if verb not in VERBS:
            raise UserError(f"unknown verb '{verb}'; use one of {', '.join(VERBS)}")
        if verb in SLOW and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
            print(f"dist-train {verb}: loading", file=sys.stderr, flush=True)
        # Imported on demand: `dist-train --help` must not wait for torch.
        code: int = importlib.import_module(f"dist_train.commands.{VERBS[verb]}").run(rest)
        return code
    except UserError as error:
        _say(verb, error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at its end, and would print the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _say(verb: str, error: UserError) -> None:
    """Print an error once: rank 0 for all where all ranks find it, and a rank for itself where only that one can have."""
    rank, torch = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")), sys.modules.get("torch")
    alone = torch is not None and torch.distributed.is_initialized() and not error.on_all_ranks
    if rank == "0" or alone:
        print(f"dist-train {verb}: {f'rank {rank}: ' if alone else ''}{error}", file=sys.stderr)
