"""HTML pages with everything inside, which open without a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 70rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin-bottom: .3rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d8d8d8; white-space: nowrap }
th { border-bottom: 2px solid #777 } th.name, td.name { text-align: left } th:first-child, td:first-child { padding-left: 0 }
table.wide { font-size: .72rem } .wide th, .wide td { padding: .2rem .3rem } .wide .text { white-space: normal; overflow-wrap: anywhere; min-width: 1.9rem }
.wide .name { white-space: normal; min-width: 7rem; max-width: 15rem; position: sticky; left: 0; background: #fff }
img { max-width: min(100%, 56rem); height: auto; display: block; margin: .8rem 0 } li { margin: .2rem 0 }
p.words, footer { color: #505050; font-size: .88rem; margin: .2rem 0 } section, tr, img, li { break-inside: avoid }
@media print { body { margin: 0; max-width: none; font-size: 10pt } .scroll { overflow: visible } td, th { padding: .15rem .4rem; white-space: normal } }
"""


def page(title: str, parts: Iterable[str], *, refresh_seconds: int | None = None) -> str:
    """A whole page under a title, of parts of HTML; with ``refresh_seconds`` a browser loads it again that often."""
    escaped = html.escape(title)
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds is not None else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped}</title><style>{STYLE}</style></head><body><h1>{escaped}</h1>{''.join(parts)}</body></html>\n"
    )


def section(title: str, words: str, content: str) -> str:
    """A part of a page: a sentence about what it shows, and its content as HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{paragraph(words)}{content}</section>"


def paragraph(words: str) -> str:
    """A line of small print."""
    return f"<p class=words>{html.escape(words)}</p>"


def picture(png: bytes, alt: str) -> str:
    """A picture, inside of the page."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def bullets(lines: Iterable[str]) -> str:
    """A list of lines."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
