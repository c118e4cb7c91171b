"""Tables as aligned text, Markdown, HTML and CSV from the same cells."""

from __future__ import annotations

import csv
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TEXT_WIDTH = 120
"""Characters of a line of text; columns that do not fit follow below."""
WIDE = 8
"""Columns above which a table in HTML is set narrower."""


@dataclass(frozen=True)
class Table:
    """Cells of text under a header; the first ``names`` columns are aligned to the left, the others to the right.

    ``words`` are a sentence below the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    words: str = ""

    def text(self) -> str:
        """Aligned columns, under the title where there is one; those that do not fit in a line follow below."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        names, rest = list(range(self.names)), list(range(self.names, len(widths)))
        taken = sum(widths[column] + 2 for column in names)
        blocks: list[list[int]] = [[]]
        for column in rest:
            if blocks[-1] and taken + sum(widths[k] + 2 for k in [*blocks[-1], column]) - 2 > TEXT_WIDTH:
                blocks.append([])
            blocks[-1].append(column)

        def aligned(line: Sequence[str], block: Sequence[int]) -> str:
            left, right = (line[k].ljust(widths[k]) for k in names), (line[k].rjust(widths[k]) for k in block)
            return "  ".join([*left, *right]).rstrip()

        texts = ["\n".join(aligned(line, block) for line in lines) for block in blocks]
        words = "\n" + textwrap.fill(self.words, TEXT_WIDTH) if self.words else ""
        return (f"{self.title}\n" if self.title else "") + "\n\n".join(texts) + words

    def markdown(self) -> str:
        """A Markdown table under its title."""
        ruler = [*["---"] * self.names, *["--:"] * (len(self.header) - self.names)]
        # A bare bar would end the cell.
        header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (self.header, *self.rows))
        lines = [header, ruler, *rows]
        words = f"\n\n{self.words}" if self.words else ""
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + words

    def html(self) -> str:
        """An HTML table under its title, which scrolls by itself where the page is narrower."""
        wide = len(self.header) > WIDE
        rows = [("th", self.header), *(("td", row) for row in self.rows)]
        head, *body = ("".join(self._html_cell(tag, k, cell, wide) for k, cell in enumerate(row)) for tag, row in rows)
        title = f"<h2>{html.escape(self.title)}</h2>" if self.title else ""
        start = f"{title}<div class=scroll><table{' class=wide' if wide else ''}><thead><tr>{head}</tr></thead>"
        words = f"<p class=words>{html.escape(self.words)}</p>" if self.words else ""
        return f"{start}<tbody>{''.join(f'<tr>{row}</tr>' for row in body)}</tbody></table></div>{words}"

    def _html_cell(self, tag: str, column: int, cell: str, wide: bool) -> str:
        """In a wide table a spread goes below its mean, and words, not numbers, may break anywhere."""
        # A cell whose upper and lower case differ has letters: it is words.
        kind = " class=name" if column < self.names else " class=text" if cell.upper() != cell.lower() else ""
        text = html.escape(cell).replace(" ± ", "<br>±&nbsp;" if wide else "&nbsp;±&nbsp;") or "&nbsp;"
        return f"<{tag}{kind}>{text}</{tag}>"


def millions(count: float) -> str:
    """A count as ``12.34 M``."""
    return f"{count / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """Seconds as ``2 h 05 min``, ``3 min 20 s`` or ``45 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def csv_text(lines: Sequence[Sequence[object]]) -> str:
    """CSV of lines of cells; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def csv_of_dicts(rows: Sequence[Mapping[str, object]]) -> str:
    """CSV with one column per key, in the order in which the keys come up."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text([names, *([row.get(name) for name in names] for row in rows)])
