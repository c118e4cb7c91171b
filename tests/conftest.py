"""Fixtures of all tests: real processes, real data."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# DeepSpeed and the tests' own processes must not look for GPUs or fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.pop("MLFLOW_TRACKING_URI", None)
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real images and parity figures; tests that want it skip where it is not given."""
    folder = os.environ.get("DIST_TRAIN_TEST_DATA")
    if not folder:
        pytest.skip("DIST_TRAIN_TEST_DATA is not set: no real images here")
    return Path(folder)


@pytest.fixture
def ranks(tmp_path):
    """`ranks(function, world_size, *arguments)` runs a test file's function on that many processes: results by rank."""

    def run(function, world_size, *arguments, timeout=240):
        from dist_train.dist import free_port

        folder = tmp_path / f"ranks{free_port()}"
        folder.mkdir()
        (folder / "arguments").write_bytes(pickle.dumps(arguments))
        environment = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(free_port())
        source = function.__code__.co_filename
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "tests" / "rank.py",
                    source,
                    function.__name__,
                    folder / "arguments",
                    folder / f"result{rank}",
                ],
                env=os.environ
                | environment
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        failed = [f"rank {rank}:\n{outputs[rank]}" for rank, process in enumerate(processes) if process.returncode]
        assert not failed, "\n".join(failed)
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world_size)]

    return run


@pytest.fixture
def command():
    """`command(module, *arguments)` runs `python -m module` and returns the finished process with its output."""

    def run(module, *arguments, timeout=240, **options):
        words = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, cwd=ROOT, **options)

    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """`refused(verb, *arguments)`: the one line that dist-train says before it exits with 2, without a process group."""

    def run(*arguments):
        from dist_train import cli
        from dist_train.dist import Group

        with monkeypatch.context() as patch:
            patch.delattr(Group, "__init__")
            assert cli.run([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        said = captured.err + captured.out
        assert said.count("\n") == 1, said
        return said

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Shards of scikit-learn's handwritten digits."""
    folder = tmp_path_factory.mktemp("shards") / "digits"
    subprocess.run(
        [sys.executable, "-m", "shards", "make", "digits", folder], check=True, cwd=ROOT, capture_output=True
    )
    return folder
