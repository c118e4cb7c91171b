"""Names of classes and runs in figures and tables: whatever they are, they are shown as they are."""

import numpy as np
import pytest
from PIL import Image

from dist_train.render.figure import legend_below, new_figure, to_png
from dist_train.render.table import Table


def drawn(name):
    """A figure with the name as a title, at a tick, as an axis and in the legend; its pixels."""
    import io

    figure, (axes,) = new_figure(3.0)
    axes.plot([0, 1], [0, 1], label=name)
    axes.set_title(name)
    axes.set_xlabel(name)
    axes.set_yticks([0, 1], [name, "other"])
    legend_below(figure, *axes.get_legend_handles_labels())
    return np.asarray(Image.open(io.BytesIO(to_png(figure))))


@pytest.mark.parametrize("name", ["Cash_$_$", "A$__$", "$x^2$", r"$\frac{1}$"])
def test_dollar_signs_make_no_formula(name):
    pixels = drawn(name)
    # A formula is drawn narrower, and in another font.
    assert not np.array_equal(pixels, drawn(name.replace("$", "")))


def test_bars_do_not_end_a_cell_of_markdown():
    lines = Table("title", ["run|a", "top-1"], [["b|c", "1"]]).markdown().splitlines()
    assert lines[2:] == ["| run\\|a | top-1 |", "| --- | --: |", "| b\\|c | 1 |"]
