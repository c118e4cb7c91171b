"""One rank of a test: runs a function of a test file in a process of its own (see the fixture `ranks`).

Such a rank ends without the interpreter's shutdown, which only the tests that start commands cover.
"""

import importlib.util
import multiprocessing
import os
import pickle
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORKSERVER = multiprocessing.get_context("forkserver")
# Ranks are forks of a process that has done nothing but import these: most of a short rank's time is imports otherwise.  On a GPU
# not even that, because DeepSpeed asks CUDA for its devices when it is imported, and CUDA works in no fork of a process that did.
if os.environ.get("DIST_TRAIN_TEST_GPU") != "1":
    FORKSERVER.set_forkserver_preload(["dist_train.training.trainer", "deepspeed", "torch._dynamo"])


def start(source: str, function: str, arguments: Path, result: Path, environment: dict[str, str]) -> ForkServerProcess:
    """Start the function with pickled arguments; its value and what it prints are in ``result`` and ``result``.txt."""
    result.with_suffix(".txt").touch()
    process = FORKSERVER.Process(target=_run, args=(source, function, arguments, result, environment))
    process.start()
    return process


def _run(source: str, function: str, arguments: Path, result: Path, environment: dict[str, str]) -> None:
    with result.with_suffix(".txt").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # What the test has set since the first of these processes began; libraries have read their variables by then.
    os.environ.clear()
    os.environ.update(environment)
    spec = importlib.util.spec_from_file_location("test_under_ranks", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    value = getattr(module, function)(*pickle.loads(arguments.read_bytes()))
    result.write_bytes(pickle.dumps(value))
