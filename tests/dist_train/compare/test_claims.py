"""The claims of a comparison: which pairs they are made of, what is said of those that are missing, and what is written."""

import csv
import io

import numpy as np
import pytest

from dist_train.compare.claims import claims
from dist_train.compare.files import html_page, markdown, text, write
from dist_train.compare.grouping import compare
from dist_train.compare.runs import read_folder
from dist_train.compare.statistics import holm, t_interval, t_test
from dist_train.compare.tables import claims_csv
from dist_train.errors import DataError
from dist_train.tracking.outcomes import RIGHT, UNCOUNTED, WRONG, pack, unpack

IMAGES = 1000


@pytest.fixture
def make_arm(make_run):
    """`make_arm(teachers, tops, seeds)` writes a run per seed whose exits are right with these probabilities."""

    def make(teachers, tops, seeds=range(5), outcomes=True, **fields):
        folders = []
        for seed in seeds:
            # Of one seed both arms have the same luck with the images, as with the same initial weights.
            draws = np.random.default_rng(int(seed)).random((IMAGES, 1)) + np.random.default_rng(9).random((IMAGES, 1))
            right = draws / 2 < np.array(tops) + 0.01 * np.random.default_rng(int(seed)).normal()
            table = np.where(right, RIGHT, WRONG).astype(np.uint8)
            report = {"outcomes": pack(table)} if outcomes else {}
            name = f"{teachers}{seed}"
            run = make_run(
                name, right.mean(0).tolist(), seed=seed, images=IMAGES, report=report, loss__teachers=teachers, **fields
            )
            folders.append(run)
        return folders

    return make


def compared(*arms):
    return compare([read_folder(folder) for arm in arms for folder in arm])


def test_outcomes_are_packed_without_loss():
    outcomes = np.random.default_rng(0).choice([WRONG, RIGHT], (37, 3)).astype(np.uint8)
    outcomes[[0, 5, 36]] = UNCOUNTED
    np.testing.assert_array_equal(unpack(pack(outcomes)), outcomes)
    with pytest.raises(DataError, match="outcomes"):
        unpack(pack(outcomes) | {"counted": "?"})


def test_every_gain_is_that_of_the_pairs_of_equal_seeds(make_arm):
    alone, taught = make_arm("none", [0.40, 0.50]), make_arm("last", [0.46, 0.50])
    comparison = compared(alone, taught)
    gains, first = claims(comparison)
    assert [(one.exit, one.base_exit) for one in gains.findings] == [(1, 1), (2, 2)]
    assert [(one.exit, one.base_exit) for one in first.findings] == [(1, 2)]
    tops = [[[exit["top1"] for exit in read_folder(folder).exits] for folder in arm] for arm in (alone, taught)]
    differences = (np.array(tops[1])[:, 0] - np.array(tops[0])[:, 1]).tolist()
    found = first.findings[0].effect
    images = read_folder(taught[0]).report["images"]
    assert (found.over_seeds, found.p) == (t_interval(differences, images), t_test(differences, images))
    assert found.over_images[0] < found.mean < found.over_images[1]
    assert found.over_both[0] < min(found.over_images[0], found.over_seeds[0])
    everything = [one for claim in (gains, first) for one in claim.findings]
    assert [one.p_holm for one in everything] == holm([one.effect.p for one in everything])
    assert gains.findings[0].significant
    # Exit 2 is the same in both arms: no difference at any seed, and none that is significant.
    assert (gains.findings[1].effect.mean, gains.findings[1].p_holm) == (0.0, 1.0)
    assert "1 of these 2 differences are not significant at 5 % (n.s.)" in gains.words


def test_the_first_exit_claim_is_for_distillation_against_the_exit_wise_baseline_alone(make_arm):
    last, later = make_arm("last", [0.40, 0.50], range(2)), make_arm("later", [0.46, 0.55], range(2))
    assert [claim.name for claim in claims(compared(last, later))] == ["gains"]


def test_an_arm_that_is_not_paired_is_said(make_arm):
    alone = make_arm("none", [0.40, 0.50], [0, 1, 2])
    comparison = compared(alone, make_arm("last", [0.46, 0.50], [1, 2, 3]), make_arm("next", [0.46, 0.50], [7, 8]))
    assert {(one.group.label, one.effect.seeds) for claim in claims(comparison) for one in claim.findings} == {
        ("teachers last", ("1", "2"))
    }
    notes = "\n".join(comparison.notes)
    assert "teachers last: seed 3 has no partner in teachers none, and is left out of the differences" in notes
    assert "teachers none: seed 0 has no partner in teachers last, and is left out of the differences" in notes
    assert (
        "teachers next: no seed in common with teachers none (7, 8 and 0, 1, 2); its differences are of means" in notes
    )


def test_one_seed_is_said_to_have_no_interval(make_arm):
    comparison = compared(make_arm("none", [0.40, 0.50], [3]), make_arm("last", [0.46, 0.50], [3]))
    (gain, _), (_,) = (claim.findings for claim in claims(comparison))
    assert (gain.effect.over_seeds, gain.p_holm, gain.significant) == (None, None, False)
    assert gain.effect.over_images is not None
    assert claims(comparison)[0].words == "A single seed has no interval over seeds, and no test."
    assert "n.s." not in text(comparison)


def test_reports_without_outcomes_have_no_interval_over_images_and_damaged_ones_are_an_error(make_arm):
    alone, taught = make_arm("none", [0.4, 0.5], range(2), outcomes=False), make_arm("last", [0.4, 0.5], range(2))
    comparison = compared(alone, taught)
    assert {one.effect.over_images for claim in claims(comparison) for one in claim.findings} == {None}
    assert "Reports without the outcomes of their images have no intervals over images" in claims(comparison)[0].words
    path = taught[0] / "report.json"
    path.write_text(path.read_text().replace('"counted": "', '"counted": "!'))
    with pytest.raises(DataError, match=r"last0: its report\.json has damaged outcomes"):
        claims(compared(make_arm("next", [0.4, 0.5], range(2)), taught))


def test_tables_pages_and_files_show_the_claims(make_arm, tmp_path):
    comparison = compared(make_arm("none", [0.40, 0.50]), make_arm("last", [0.46, 0.51]))
    for shown in (text(comparison), markdown(comparison), html_page(comparison, {})):
        assert "First exit distilled, minus last exit exit-wise" in shown
        assert "exit 1 − exit 2" in shown
        assert "seeds would show 0.5 points" in " ".join(shown.split())
    rows = list(csv.DictReader(io.StringIO(claims_csv(comparison))))
    assert [row["claim"] for row in rows] == ["gains", "gains", "first_exit"]
    assert rows[0]["seeds"] == "0 1 2 3 4"
    assert float(rows[0]["over_seeds_low"]) < float(rows[0]["difference"]) < float(rows[0]["over_seeds_high"])
    folder = tmp_path / "out"
    write(comparison, folder)
    assert {"gains.png", "first_exit.png", "claims.csv"} <= {path.name for path in folder.iterdir()}
    # A comparison without the claims leaves no pictures of them.
    write(compared(make_arm("next", [0.4, 0.5])), folder)
    assert not {"gains.png", "first_exit.png"} & {path.name for path in folder.iterdir()}
