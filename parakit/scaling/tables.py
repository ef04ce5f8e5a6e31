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
_WIDTH = 80  # of a line, as terminals and mails have them
_GAPS = (2, 1)  # between columns, where they fit


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
    text = _laid_out([heads, *cells], left=left) if cells else ["Nothing was measured."]
    above, *below = (textwrap.fill(said, _WIDTH, subsequent_indent="  ") for said in (title, *remarks))
    return "\n".join([above, *text, *below])


def html_table(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """The same as HTML, in which the first cell of a row says what the row is of."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join(_html_row(row) for row in cells)
    below = "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks)
    return (
        f'<table><caption style="text-align:left">{html.escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"
    )


def _laid_out(lines: Sequence[Sequence[str]], *, left: bool) -> list[str]:
    """Lines of cells as text; where they are too wide, the columns on the right follow below, after the first again."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gap = next((gap for gap in _GAPS if sum(widths) + gap * (len(widths) - 1) <= _WIDTH), _GAPS[-1])
    text: list[str] = []
    for places in _blocks(widths, gap):
        text += [(" " * gap).join(_set(line[p], widths[p], left and p == 0) for p in places).rstrip() for line in lines]
    return text


def _set(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _blocks(widths: Sequence[int], gap: int) -> list[list[int]]:
    """The columns of each block, the first column at the head of all of them."""
    blocks = [[0]]
    for place in range(1, len(widths)):
        if sum(widths[each] + gap for each in blocks[-1]) + widths[place] > _WIDTH and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(place)
    return blocks


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
