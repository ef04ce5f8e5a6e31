"""Tables of a scaling study, as text and as HTML; refuses to compute what stands in them."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterator, Sequence

from parakit.progress import three_digits
from parakit.scaling.records import Row, Spread

__all__ = ["Table", "about_rivals", "between", "html_table", "rate", "text_table", "times"]

_DASH = "–"
_CROWDED = "*"
_WIDTH = 84


class Table:
    """The worker counts of a study, a row each; shows itself as text and as HTML.

    Parameters
    ----------
    rows : sequence of Row
    title : str
        One line.
    remarks : sequence of str
        Below the table.
    """

    def __init__(self, rows: Sequence[Row], title: str, remarks: Sequence[str] = ()) -> None:
        self.rows = tuple(rows)
        self.title = title
        self.remarks = tuple(remarks)

    def __getitem__(self, place: int) -> Row:
        return self.rows[place]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def _rivals(self) -> list[str]:
        return list(self.rows[0].over_plain) if self.rows else []

    def _heads(self) -> list[tuple[str, str]]:
        """The names of the columns, short and in full."""
        plain = [(_short(name), f"speedup over {name}") for name in self._rivals]
        return [
            ("workers", "workers"), ("samples/s", "samples per second, median"),
            ("quartiles", "quartiles of samples per second"),
            ("speedup", "speedup over one worker, median"),
            ("quartiles", "quartiles of speedup"), *plain,
            ("eff.", "efficiency"), ("K-F", "Karp–Flatt serial fraction"),
        ]  # fmt: skip

    def _cells(self) -> list[list[str]]:
        return [_cells(row) for row in self.rows]

    def __repr__(self) -> str:
        return text_table(self.title, [short for short, _ in self._heads()], self._cells(), self.remarks)

    def _repr_html_(self) -> str:
        """The table for a notebook: every column says in full what it is, every row what it is of."""
        return html_table(self.title, [full for _, full in self._heads()], self._cells(), self.remarks)


def text_table(
    title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], remarks: Sequence[str], *, left: bool = False
) -> str:
    """A table as text, with a title above it and remarks below; its first column may be set to the left."""
    lines = [heads, *cells]
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    widths = [-width if left and not place else width for place, width in enumerate(widths)]
    text = ["  ".join(_set(cell, width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    below = [textwrap.fill(remark, _WIDTH, subsequent_indent="  ") for remark in remarks]
    return "\n".join([title, *(text if cells else ["Nothing was measured."]), *below])


def _set(cell: str, width: int) -> str:
    return cell.ljust(-width) if width < 0 else cell.rjust(width)


def html_table(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """The same as HTML, in which the first cell of a row says what the row is of."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join(_html_row(row) for row in cells)
    below = "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks)
    return (
        f'<table><caption style="text-align:left">{html.escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"
    )


def _short(rival: str) -> str:
    """Plain PyTorch with 2 cores as "/plain 2": a speedup over it."""
    return f"/plain {rival.split(', ')[-1].split()[0]}"


def _html_row(cells: Sequence[str]) -> str:
    first, *others = map(html.escape, cells)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'


def _cells(row: Row) -> list[str]:
    return [
        f"{row.workers:,}{_CROWDED if row.crowded else ''}",
        rate(row.rate.median),
        between(rate(row.rate.low), rate(row.rate.high)),
        times(row.speedup.median),
        # One worker is what the others are compared with: its ratio has no spread.
        _DASH if row.workers == 1 else between(times(row.speedup.low), times(row.speedup.high)),
        *(times(over.median) for over in row.over_plain.values()),
        _DASH if math.isnan(row.efficiency) else f"{100 * row.efficiency:.0f} %",
        _DASH if math.isnan(row.karp_flatt) else f"{row.karp_flatt:.3f}",
    ]


def rate(value: float) -> str:
    """Samples per second, to three digits; a dash where there are none."""
    return _DASH if math.isnan(value) else three_digits(value)


def times(value: float) -> str:
    """A ratio; a dash where there is none."""
    return _DASH if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def between(low: str, high: str) -> str:
    """A range; a dash where there is none."""
    return _DASH if low == _DASH else f"{low}–{high}"


def about_rivals(rivals: dict[str, Spread]) -> str:
    """The rates of the rivals in one sentence; "" where none was measured."""
    told = [f"{name}: {rate(s.median)} samples/s ({between(rate(s.low), rate(s.high))})" for name, s in rivals.items()]
    return "; ".join(told)
