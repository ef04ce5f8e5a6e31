"""Tables of a scaling study, as text and as HTML; refuses to compute what stands in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from parakit.formatting import DASH, between, html_table, rate, text_table, times
from parakit.scaling.study.records import Row, Spread

__all__ = ["Table", "about_rivals"]

_CROWDED = "*"


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


def _short(rival: str) -> str:
    """Plain PyTorch with 2 cores as "/plain 2": a speedup over it."""
    return f"/plain {rival.split(', ')[-1].split()[0]}"


def _cells(row: Row) -> list[str]:
    return [
        f"{row.workers:,}{_CROWDED if row.crowded else ''}",
        rate(row.rate.median),
        between(rate(row.rate.low), rate(row.rate.high)),
        times(row.speedup.median),
        # One worker is what the others are compared with: its ratio has no spread.
        DASH if row.workers == 1 else between(times(row.speedup.low), times(row.speedup.high)),
        *(times(over.median) for over in row.over_plain.values()),
        DASH if math.isnan(row.efficiency) else f"{100 * row.efficiency:.0f} %",
        DASH if math.isnan(row.karp_flatt) else f"{row.karp_flatt:.3f}",
    ]


def about_rivals(rivals: dict[str, Spread]) -> str:
    """The rates of the rivals in one sentence; "" where none was measured."""
    told = [f"{name}: {rate(s.median)} samples/s ({between(rate(s.low), rate(s.high))})" for name, s in rivals.items()]
    return "; ".join(told)
