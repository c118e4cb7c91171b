"""Fixtures of all tests: real processes, real data."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Before torch is imported, here and in every process of a test: DeepSpeed and they must not look for GPUs or fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On a busy machine threads that spin while they wait for each other take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.pop("MLFLOW_TRACKING_URI", None)
# The expected figures are those of a CPU; make test-gpu is what asks for GPUs.
if os.environ.get("DIST_TRAIN_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)

from tests.common import LIMIT, ROOT  # noqa: E402
from tests.rank import start  # noqa: E402

SLOW = {
    "tests/dist_train/tracking/test_mirror.py": {
        "test_what_cannot_be_synced_is_refused",
        "test_a_field_with_its_first_value_again_is_not_marked_as_changed",
        "test_a_copy_of_a_finished_run_is_another_finished_run",
        "test_metrics_that_were_rewound_after_the_mirror_began_are_sent",
        "test_what_two_threads_write_down_of_a_run_is_both_kept",
    },
    "tests/dist_train/training/test_changes.py": set(),
    "tests/dist_train/training/test_cifar.py": set(),
    "tests/dist_train/training/test_engine.py": {
        "test_all_zero_stages_make_the_same_updates",
        "test_an_update_that_is_not_finite_on_one_rank_changes_nothing_on_any",
        "test_what_a_cpu_cannot_do_is_refused",
    },
    "tests/dist_train/training/test_authors.py": set(),
    "tests/dist_train/training/test_exit_gradients.py": {
        "test_the_exits_behind_a_parameter_are_those_whose_gradient_it_has",
        "test_exits_meet_each_other_in_an_order_of_their_own_in_every_update",
        "test_pcgrad_is_refused_where_one_backward_pass_is_all_there_is",
    },
    "tests/dist_train/training/test_regimes.py": set(),
    "tests/dist_train/training/test_variants.py": set(),
    "tests/dist_train/training/test_resume.py": {"test_the_same_command_after_the_end_changes_nothing"},
    "tests/launch/test_campaign.py": set(),
    "tests/launch/test_faults.py": set(),
    "tests/launch/test_local.py": {
        "test_a_rank_that_dies_ends_the_others_and_the_launcher_says_so",
        "test_the_ranks_of_a_machine_divide_its_cores_and_keep_what_a_launcher_gave",
        "test_a_request_to_stop_while_the_launcher_still_starts_ends_it",
    },
    "tests/launch/test_nodes.py": {
        "test_a_node_that_cannot_be_reached_is_named_and_nothing_starts",
        "test_hostfiles_that_say_nothing_usable_are_refused",
    },
    "tests/launch/test_one_run.py": {
        "test_the_lock_says_who_holds_it_and_dies_with_the_holder",
        "test_a_rank_that_outlives_rank_0_keeps_the_folder",
        "test_mpirun_is_told_how_to_start",
    },
    "tests/launch/test_study.py": {
        "test_a_wrong_study_is_one_line_before_anything_starts",
        "test_a_command_that_cannot_be_started_is_one_line",
        "test_names_of_variants_are_taken_as_they_are_written",
        "test_a_cell_trained_with_other_settings_is_refused",
        "test_shipped_studies_have_valid_cells",
        "test_axes_multiply_and_values_are_named_after_their_field",
    },
    "tests/shards/test_interrupted.py": {"test_two_at_once_are_refused"},
}
"""Files whose tests are slow, except for those named: `make test-quick` covers every package, and leaves the others out."""

SLOW_TESTS = (
    "tests/test_docs_run.py",
    "tests/test_examples.py",
    "tests/test_wheel.py",
    "tests/dist_train/models/test_libraries.py",
    "tests/dist_train/training/test_mixture.py::test_a_run_on_a_mixture_reads",
    "tests/dist_train/data/test_bench.py::test_every_way_gives_the_images_of_an_epoch",
    "tests/dist_train/data/test_remote.py::test_processes_of_a_node_fetch_each_shard_once_and_read_what_is_there",
    "tests/dist_train/evaluation/test_report.py::test_every_number_of_ranks_gives_the_same_report",
    "tests/dist_train/evaluation/test_samples.py::test_ranks_and_batches_change_nothing",
    "tests/dist_train/loss/test_bench.py",
    "tests/dist_train/loss/test_kernel.py::test_compiled_without_spilled_registers",
    "tests/dist_train/loss/test_kernel.py::test_in_the_interpreter",
    "tests/dist_train/loss/test_temperature.py::test_ranks_with_unequal_labels_train_as_one[3]",
    "tests/dist_train/models/test_bench.py",
    "tests/dist_train/training/test_resume.py::test_the_same_command_after_the_end_changes_nothing[4]",
    "tests/dist_train/models/test_cost.py::test_costs_of_published_configurations[ImageNet",
    "tests/dist_train/models/test_msdnet.py::test_dialects_are_the_same_function_of_permuted_weights[min]",
    "tests/dist_train/models/test_msdnet.py::test_iter_exits_runs_just_what_an_exit_depends_on[min-",
)
"""Beginnings of the names of single slow tests."""


EXTENDED = (
    "tests/launch/test_campaign.py",
    "tests/launch/test_namespaces.py",
    "tests/launch/test_one_run.py::test_ranks_whose_launcher_is_killed_save_and_end[deepspeed]",
    "tests/launch/test_study.py::test_a_killed_study_goes_on_and_trains_no_finished_cell_again",
    "tests/dist_train/training/test_cifar.py",
    "tests/dist_train/training/test_variants.py",
)
"""Beginnings of the names of tests that take minutes, and that state again, at random or in the large, what others state."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Mark tests as `slow`, `extended` or `slurm`, in one place: what is slow is a question of the whole suite, not of a file."""
    groups = {}
    for item in items:
        file = item.path.relative_to(ROOT).as_posix() if item.path.is_relative_to(ROOT) else ""
        whole = file in SLOW and item.originalname not in SLOW[file]
        if whole or f"{file}::{item.name}".startswith(SLOW_TESTS):
            item.add_marker("slow")
        if f"{file}::{item.name}".startswith(EXTENDED):
            item.add_marker("extended")
        slurm = file.startswith("tests/launch/test_slurm")
        if slurm:
            item.add_marker("slurm")
        # With several workers (-n 2), a file's tests stay together, as do those that share a SLURM or trained networks.
        export = file.startswith("tests/dist_train/export/")
        groups[item] = "slurm" if slurm else "export" if export else file
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    # What takes long begins first, so that no worker is left alone with it at the end.
    long = {groups[item] for item in items if item.get_closest_marker("slow") or item.get_closest_marker("slurm")}
    items.sort(key=lambda item: (groups[item] not in long, groups[item] != "slurm"))


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
    return in_ranks(tmp_path)


@pytest.fixture(scope="module")
def ranks_of_module(tmp_path_factory):
    """The same for fixtures of a whole module."""
    return in_ranks(tmp_path_factory.mktemp("ranks"))


def in_ranks(tmp_path):
    def run(function, world_size, *arguments, timeout=LIMIT):
        from dist_train.distributed.launcher import free_port

        folder = tmp_path / f"ranks{free_port()}"
        folder.mkdir()
        (folder / "arguments").write_bytes(pickle.dumps(arguments))
        environment = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(free_port())
        source = function.__code__.co_filename
        results = [folder / f"result{rank}" for rank in range(world_size)]
        processes, deadline = [], time.monotonic() + timeout
        try:
            for rank, result in enumerate(results):
                place = os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(start(source, function.__name__, folder / "arguments", result, place))
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
        failed = [
            f"rank {rank}, exit code {code} (None: no end after {timeout} s):\n{result.with_suffix('.txt').read_text()}"
            for rank, (code, result) in enumerate(zip(codes, results))
            if code != 0
        ]
        assert not failed, "\n".join(failed)
        return [pickle.loads(result.read_bytes()) for result in results]

    return run


@pytest.fixture
def command():
    """`command(module, *arguments)` runs `python -m module` and returns the finished process with its output."""

    def run(module, *arguments, timeout=LIMIT, **options):
        words = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, cwd=ROOT, **options)

    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """`refused(verb, *arguments)`: the one line that dist-train says before it exits with 2, without a process group."""

    def run(*arguments):
        from dist_train import cli
        from dist_train.distributed.group import Group

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
