"""Numbers, durations and tables in words and columns, as people read them."""

from __future__ import annotations

import html
import math
import sys
import textwrap
from collections.abc import Sequence

__all__ = [
    "DASH",
    "between",
    "clock",
    "columns",
    "html_grid",
    "html_table",
    "in_a_notebook",
    "many",
    "rate",
    "text_table",
    "three_digits",
    "times",
    "unit_of",
]


def in_a_notebook() -> bool:
    """Whether this process is a Jupyter kernel, where a line written over and over only fills the page."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def clock(seconds: float) -> str:
    """Minutes and seconds; "?" for NaN."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def many(count: int, noun: str) -> str:
    """A number of things in words."""
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}s"


def three_digits(samples_per_second: float) -> str:
    """Three digits: a measurement is not better than that."""
    rounded = float(f"{samples_per_second:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


_CALLED = {"cpu": "core", "cuda": "GPU"}


def unit_of(kind: str) -> str:
    """What one of those that compute is called, for people: "core" or "GPU"."""
    return _CALLED[kind]


#: Where a table has no number.
DASH = "–"
_WIDTH = 80  # of a line, as terminals and mails have them
_GAPS = (2, 1)  # between columns, where they fit


def text_table(
    title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], remarks: Sequence[str], *, left: bool = False
) -> str:
    """A table as text, with a title above it and remarks below; its first column may be set to the left."""
    text = columns([heads, *cells], left=left) if cells else ["Nothing was measured."]
    above, *below = (textwrap.fill(said, _WIDTH, subsequent_indent="  ") for said in (title, *remarks))
    return "\n".join([above, *text, *below])


def html_table(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """The same as HTML, in which the first cell of a row says what the row is of."""
    below = "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks)
    return html_grid(heads, cells, title, named=True) + below


def html_grid(heads: Sequence[str], cells: Sequence[Sequence[str]], title: str = "", *, named: bool = False) -> str:
    """A table alone, as HTML; if its rows are named, by their first cells, a screen reader says so."""
    caption = f'<caption style="text-align:left">{html.escape(title)}</caption>' if title else ""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join(_html_row(row, named) for row in cells)
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def columns(lines: Sequence[Sequence[str]], *, left: bool = False, width: float = _WIDTH) -> list[str]:
    """Lines of cells as text; where they are too wide, the columns on the right follow below, after the first again."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gap = next((gap for gap in _GAPS if sum(widths) + gap * (len(widths) - 1) <= width), _GAPS[-1])
    text: list[str] = []
    for places in _blocks(widths, gap, width):
        text += [(" " * gap).join(_set(line[p], widths[p], left and p == 0) for p in places).rstrip() for line in lines]
    return text


def _set(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _blocks(widths: Sequence[int], gap: int, width: float) -> list[list[int]]:
    """The columns of each block, the first column at the head of all of them."""
    blocks = [[0]]
    for place in range(1, len(widths)):
        if sum(widths[each] + gap for each in blocks[-1]) + widths[place] > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(place)
    return blocks


def _html_row(cells: Sequence[str], named: bool) -> str:
    first, *others = map(html.escape, cells)
    head = f'<th scope="row">{first}</th>' if named else f"<td>{first}</td>"
    return f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"


def rate(value: float) -> str:
    """Samples per second, to three digits; a dash where there are none."""
    return DASH if math.isnan(value) else three_digits(value)


def times(value: float) -> str:
    """A ratio; a dash where there is none."""
    return DASH if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def between(low: str, high: str) -> str:
    """A range; a dash where there is none."""
    return DASH if low == DASH else f"{low}–{high}"
