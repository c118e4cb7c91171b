"""Options of the benchmarks: a number that measures nothing is refused before anything is measured."""

import pytest


@pytest.mark.parametrize(
    "words",
    [
        "compare --runs 0",
        "compare --points 0",
        "data --images x --rounds 0",
        "eval --images 0",
        "model --steps 0",
        "model --batch -1",
        "order --samples 0 --shards 0",
        "shards --count 0",
        "start --runs 0",
        "step --processes 1 0",
        "step --steps x",
        "step --micro-batch 0",
    ],
)
def test_a_number_that_measures_nothing_is_one_line(words, refused):
    assert "is not a whole number above 0; see dist-train bench" in refused("bench", *words.split())
