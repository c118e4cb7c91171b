"""Groups, means and differences are those that a hand computes."""

import csv
import io

import pytest

from dist_train.compare.files import text
from dist_train.compare.grouping import LONGEST_LABEL, MeanStd, compare, difference
from dist_train.compare.runs import read_folder
from dist_train.compare.tables import accuracy_csv, runs_csv, tables
from dist_train.render.table import TEXT_WIDTH


def test_runs_that_differ_only_in_seed_are_one_group(make_run):
    folders = [
        make_run("a0", [0.50, 0.60], seed=0, loss__teachers="none"),
        make_run("b0", [0.54, 0.60], seed=0, loss__teachers="later", loss__alpha=0.3),
        make_run("a1", [0.60, 0.64], seed=1, loss__teachers="none", tracking__experiment="other", checkpoint__keep=5),
        make_run("b1", [0.66, 0.64], seed=1, loss__teachers="later", loss__alpha=0.3),
    ]
    comparison = compare([read_folder(folder) for folder in folders])
    first, second = comparison.groups
    assert [run.name for run in first.runs] == ["a0", "a1"]
    assert comparison.fields == ["loss.teachers", "loss.alpha"]
    assert (first.label, second.label) == ("teachers none, alpha 0.5", "teachers later, alpha 0.3")
    top1 = first.spread(1)
    assert (top1.mean, top1.sd, top1.n) == (pytest.approx(0.55), pytest.approx(0.1 / 2**0.5), 2)
    # At equal seeds: 0.04 and 0.06, and twice 0, although the accuracies themselves spread by far more.
    change = comparison.difference(second, 1)
    assert (change.mean, change.sd, change.n) == (pytest.approx(0.05), pytest.approx(0.02 / 2**0.5), 2)
    assert comparison.difference(second, 2) == MeanStd(0.0, 0.0, 2)
    assert comparison.difference(first, 1) is None
    rows = list(csv.DictReader(io.StringIO(accuracy_csv(comparison))))
    assert [float(row["top1"]) for row in rows] == pytest.approx([0.55, 0.62, 0.60, 0.62])
    assert [row["against"] for row in rows] == ["", "", first.label, first.label]
    assert float(rows[2]["difference"]) == pytest.approx(0.05)
    assert len(list(csv.DictReader(io.StringIO(runs_csv(comparison))))) == 8


def test_difference_without_common_seeds_is_that_of_the_means():
    change = difference({"0": 0.1, "1": 0.3}, {"2": 0.5, "3": 0.9, "4": 0.7})
    assert change.mean == pytest.approx(0.5)
    assert change.sd == pytest.approx((0.02 + 0.04) ** 0.5)
    assert difference({"0": 0.1}, {"1": 0.4}).sd is None
    assert difference({}, {"1": 0.4}) is None
    assert difference({"0": 0.25}, {"0": 0.5, "1": 9.0}) == MeanStd(0.25, None, 1)


def test_a_difference_has_the_base_it_was_given(make_run):
    names = ["few, plain", "few, taught", "many, plain", "many, taught"]
    tops = [[0.1], [0.3], [0.6], [0.7]]
    folders = [make_run(f"r{n}", top, loss__alpha=0.1 * (n + 1)) for n, top in enumerate(tops)]
    labels = {f"r{n}": name for n, name in enumerate(names)}
    bases = {name: name.split(",")[0] + ", plain" for name in names}
    comparison = compare([read_folder(folder) for folder in folders], labels=labels, bases=bases)
    changes = [comparison.difference(group, 1) for group in comparison.groups]
    assert [change and round(change.mean, 9) for change in changes] == [None, 0.2, None, 0.1]


def test_time_leaves_pauses_out_and_speed_is_over_the_whole_training(make_run):
    lines = [
        (10, 10, {"speed/images_per_second": 64.0}),
        (20, 10_000_000, {"speed/images_per_second": 128.0}),  # a day later, after a pause
    ]
    run = read_folder(make_run("a", [0.5], lines=lines, train__global_batch=64))
    assert run.seconds == pytest.approx(10 + 5)
    assert run.images_per_second == pytest.approx(20 * 64 / 15)


def test_images_of_skipped_updates_took_time_too(make_run):
    lines = [
        (10, 20, {"speed/images_per_second": 64.0, "train/skipped_steps": 10.0}),
        (30, 40, {"speed/images_per_second": 128.0, "train/skipped_steps": 10.0}),
    ]
    run = read_folder(make_run("a", [0.5], lines=lines, train__global_batch=64))
    assert run.seconds == pytest.approx(20 + 10)
    assert run.images_per_second == pytest.approx(40 * 64 / 30)


def test_groups_have_different_names(make_run):
    places = ("a/digits", "b/digits", "b/photos")
    runs = [read_folder(make_run(f"r{n}", [0.5], data__shards=place)) for n, place in enumerate(places)]
    assert [group.label for group in compare(runs).groups] == [f"shards {place}" for place in places]
    assert [group.label for group in compare(runs[1:]).groups] == ["shards digits", "shards photos"]


def test_reports_on_other_images_are_not_compared(make_run):
    data = {"val_data": "aaaa"}
    runs = [
        make_run("a", [0.5], data=data, loss__alpha=0.1),
        make_run("b", [0.7], data=data, loss__alpha=0.2, report={"split": "test"}),
        make_run("c0", [0.7], data=data, loss__alpha=0.3, report={"split": "val", "data": "aaaa"}),
        make_run("c1", [0.7], data=data, loss__alpha=0.3, report={"split": "val", "data": "bbbb"}, seed=1),
        make_run("d", [0.8], data=data, loss__alpha=0.4, report={"split": "val", "data": "aaaa"}),
    ]
    comparison = compare([read_folder(folder) for folder in runs])
    _, b, c, d = comparison.groups
    assert [comparison.difference(group, 1) for group in (b, c)] == [None, None]
    assert comparison.difference(d, 1).mean == pytest.approx(0.3)
    notes = "\n".join(comparison.notes)
    assert (
        "alpha 0.2: other evaluation images (aaaa and the split test) than alpha 0.1; no differences are given" in notes
    )
    assert "alpha 0.3: its runs are evaluated on different images (aaaa/bbbb), its means are of both" in notes
    assert "alpha 0.4" not in notes


def test_reports_of_the_last_step_and_of_the_best_are_not_compared(make_run):
    """The best of many validations on the same images is above the last of them, whatever the method."""
    evaluated = {"step": 15, "exits": [{"exit": 1, "multiply_adds": 1, "parameters": 1, "top1": 0.7, "ece": 0.1}]}
    runs = [
        make_run("last", [0.5], loss__alpha=0.1),
        make_run("best", [0.7], loss__alpha=0.2, report=evaluated),
        make_run("same", [0.7], loss__alpha=0.3, report=evaluated | {"step": 20}),
    ]
    comparison = compare([read_folder(folder) for folder in runs])
    _, best, same = comparison.groups
    assert comparison.difference(best, 1) is None
    assert "alpha 0.2: other weights (some of the last step, some of the best validation" in "\n".join(comparison.notes)
    assert comparison.difference(same, 1).mean == pytest.approx(0.2)
    assert compare([read_folder(folder) for folder in runs[1:]]).difference(same, 1) is not None


def test_what_cannot_be_compared_is_said_and_the_rest_compared(make_run):
    runs = [
        make_run("a", [0.5, 0.6], data={"classes": "10", "val_data": "aaaa"}, loss__alpha=0.1),
        make_run("b", [0.7, 0.8], data={"classes": "100", "val_data": "bbbb"}, loss__alpha=0.2),
        make_run("c", None, data={"classes": "10", "val_data": "aaaa"}, loss__alpha=0.3),
        make_run("d", [0.6], data={"classes": "10", "val_data": "aaaa"}, loss__alpha=0.4),
        make_run("e", [0.9], images=50, loss__alpha=0.5),
    ]
    comparison = compare([read_folder(folder) for folder in runs])
    _, b, c, d, e = comparison.groups
    assert b.spread(2).mean == pytest.approx(0.8)
    assert comparison.difference(b, 1) is None
    assert comparison.difference(c, 1) is None
    assert comparison.difference(d, 1).mean == pytest.approx(0.1)
    assert comparison.difference(d, 2) is None
    assert comparison.difference(e, 1) is None
    notes = "\n".join(comparison.notes)
    assert "other classes (10 and 100), evaluation images (aaaa and bbbb) than alpha 0.1" in notes
    assert "c: no finished evaluation" in notes
    assert "alpha 0.4: 1 exits, alpha 0.1 has 2" in notes
    assert "number of evaluation images (100 and 50)" in notes


def test_long_labels_become_names_and_the_settings_are_one_table(make_run):
    schedules = ("constant", "cosine", "multistep")
    folders = [
        make_run(
            f"try_{number}-seed{seed}",
            [0.5, 0.6],
            seed=seed,
            loss__alpha=0.1 * (number + 1),
            optim__schedule=schedule,
            data__shards=f"data/cifar10_with_few_labels_{number}",
            optim__weight_decay=number * 1e-4,
        )
        for number, schedule in enumerate(schedules)
        for seed in (0, 1)
    ]
    comparison = compare([read_folder(folder) for folder in folders])
    assert [group.label for group in comparison.groups] == ["try_0", "try_1", "try_2"]
    settings = tables(comparison)[0]
    assert settings.header == ["", "try_0", "try_1", "try_2"]
    assert ["optim.schedule", *schedules] in settings.rows
    assert [row[0] for row in settings.rows] == comparison.fields


def test_a_variant_is_called_as_its_study_called_it(make_run):
    names = {"none": "labels alone", "later": "later exits teach"}
    folders = [
        make_run(f"r{number}", [0.5], seed=number % 2, loss__teachers=teachers, tracking__group=names[teachers])
        for number, teachers in enumerate(("none", "none", "later", "later"))
    ]
    assert [group.label for group in compare([read_folder(folder) for folder in folders]).groups] == list(
        names.values()
    )


def test_names_that_collide_are_told_apart(make_run):
    long = "x" * 45
    folders = [
        make_run(f"{long}{n}", [0.5], data__shards=f"data/{long}/{n}", loss__alpha=0.1 * n, optim__lr=0.1 + n)
        for n in range(3)
    ]
    names = [group.label for group in compare([read_folder(folder) for folder in folders]).groups]
    assert len(set(names)) == 3
    assert max(map(len, names)) <= LONGEST_LABEL


def test_text_stays_within_a_terminal(make_run):
    folders = [
        make_run(
            f"run_{number}", [0.5 + 0.01 * m for m in range(11)], loss__alpha=0.01 * number, optim__lr=0.1 + number
        )
        for number in range(20)
    ]
    comparison = compare([read_folder(folder) for folder in folders])
    printed = text(comparison)
    assert max(map(len, printed.splitlines())) <= TEXT_WIDTH
    # Nothing is cut: every label, and the last exit's accuracy of every group, is there.
    assert all(name in printed for name in comparison.names.values())
    assert printed.count("60.00") == 20
