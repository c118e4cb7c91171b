"""metrics.jsonl: whole lines, cut back to a checkpoint, and nothing lost while the disk is full."""

import errno
import os

import pytest

from dist_train.tracking.metrics import MetricsFile, parse_line, read_metrics, read_new


def append(file, batch, metrics):
    file.add(batch, batch, metrics)
    file.flush()


def batches(path):
    return [entry["batch"] for entry in read_metrics(path)]


@pytest.fixture
def file(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for batch in (2, 4, 6):
        append(file, batch, {"train/loss": 1.0})
    append(file, 6, {"val/mean_top1": 0.5})
    return file


@pytest.mark.parametrize(
    ("batch", "evaluates", "left"), [(6, False, [2, 4, 6, 6]), (6, True, [2, 4, 6]), (5, False, [2, 4]), (0, False, [])]
)
def test_what_will_be_done_again_is_dropped(file, batch, evaluates, left):
    file.rewind(batch, evaluates)
    assert batches(file.path) == left
    append(file, 7, {})
    assert batches(file.path) == [*left, 7]


def test_a_torn_line_and_a_foreign_one_are_dropped(file):
    with file.path.open("a") as tail:
        tail.write('{"other": 1}\n{"t": 1, "step": 8, "bat')
    assert batches(file.path) == [2, 4, 6, 6]
    file.rewind(6, False)
    assert file.path.read_text().count("\n") == 4
    for line in (
        "[1]",
        "[" * 100_000,
        '{"t": "x", "step": 8, "batch": 8, "metrics": {}}',
        '{"t": 1, "step": 1%s, "batch": 8, "metrics": {}}' % ("0" * 30),
        '{"t": 1, "step": 8, "batch": 8, "metrics": {"a": 1%s}}' % ("0" * 400),
    ):
        assert parse_line(line) is None


def test_a_last_line_without_its_end_does_not_swallow_the_next_one(file):
    file.path.write_text(file.path.read_text().rstrip("\n"))
    file.rewind(6, False)
    append(file, 7, {})
    assert batches(file.path) == [2, 4, 6, 6, 7]


def test_lines_that_could_not_be_written_are_written_later(file, monkeypatch):
    """The system's limit of a file's size is the full disk that a test can have."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 30, before[1]))
    try:
        for batch in (8, 10):
            with pytest.raises(OSError, match=r"too large|No space") as raised:
                append(file, batch, {"train/loss": 2.0})
            assert raised.value.errno in (errno.EFBIG, errno.ENOSPC)
            assert batches(file.path) == [2, 4, 6, 6]
            assert file.path.read_text().endswith("}\n"), "a torn line was left"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    append(file, 12, {})
    assert batches(file.path) == [2, 4, 6, 6, 8, 10, 12]
    assert os.stat(file.path).st_size == len(file.path.read_bytes())


def test_lines_that_are_none_of_ours_are_passed_over(tmp_path):
    ours = '{"t": 1, "step": 2, "batch": 3, "metrics": {"train/loss": 1.5}}'
    foreign = ['{"batch": 1}', "[]", ours.replace("1.5", '"x"'), ours.replace('{"train/loss": 1.5}', "5"), "\xff"]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join([*foreign, ours, ""]).encode("latin-1"))
    assert [entry["batch"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [3]
    with (tmp_path / "metrics.jsonl").open("rb") as file:
        assert [entry["batch"] for entry in read_new(file, 0)[0]] == [3]
