"""What a benchmark found: a table headed by the machine, as text, Markdown, and JSON for the one that collects."""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from parakit.formatting import columns
from parakit.system.this_host import name_here

REPEATS, QUICK_REPEATS = 5, 3


@dataclass(frozen=True)
class Report:
    """A table.

    Parameters
    ----------
    name, title : str
        For the picture; for people.
    heads : list of str
    rows : list of lists of str
    remarks : list of str
    figures : dict
        Numbers for a picture.
    """

    name: str
    title: str
    heads: list[str]
    rows: list[list[str]]
    remarks: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        table = columns([self.heads, *self.rows], left=True, width=math.inf)
        return "\n".join([self.title, "", *table, *self.remarks, ""])

    def markdown(self) -> str:
        def row(cells: Iterable[str]) -> str:
            return f"| {' | '.join(cells)} |"

        rule = row(["---", *["--:"] * (len(self.heads) - 1)])
        return "\n".join([f"**{self.title}**", "", row(self.heads), rule, *map(row, self.rows), "", *self.remarks, ""])


def heading() -> str:
    """The machine, and what runs on it."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "distributed"))
    return f"{name_here()}, {platform.system()}; Python {platform.python_version()}, {packages}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and quartiles, to some significant digits."""
    low, middle, high = (significant(value, digits) for value in np.percentile(list(values), [25, 50, 75]).tolist())
    return f"{middle} ({low} to {high})"


def significant(value: float, digits: int = 3) -> str:
    if value == 0:
        return "0"
    places = digits - 1 - int(np.floor(np.log10(abs(value))))
    return f"{round(value, places):,.{max(0, places)}f}"


def median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def bytes_in_words(nbytes: float) -> str:
    return f"{significant(nbytes / 1e6)} MB"


@dataclass(frozen=True)
class Pace:
    """How thorough to be."""

    quick: bool
    repeats: int

    def choose(self, usual: Any, quick: Any) -> Any:
        return quick if self.quick else usual


def run(document: str | None, measure: Callable[[Pace], Iterable[Report]]) -> None:
    """The command line of a benchmark: measure, print every table as soon as it is there, and keep them for others."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and smaller sizes: minutes less, and rough")
    parser.add_argument("--repeats", type=int, help=f"default: {REPEATS}, or {QUICK_REPEATS} if quick")
    parser.add_argument("--json", type=Path, help="keep the tables in a file, too")
    options = parser.parse_args()
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    print(f"{heading()}; {repeats} repeats: median (quartiles)\n", flush=True)
    reports: list[Report] = []
    for report in measure(Pace(options.quick, repeats)):
        print(report.text(), flush=True)
        reports.append(report)
        if options.json:  # after each: whoever interrupts it keeps what is there
            options.json.write_text(json.dumps([asdict(report) for report in reports]), encoding="utf-8")


def load(path: Path) -> list[Report]:
    if not path.exists():
        return []
    return [Report(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]


def until(condition: Callable[[], Any], seconds: float = 60.0) -> float:
    """Wait until something is the case; the seconds it took."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > seconds:
            raise TimeoutError(f"it did not come about within {seconds:g} s")
        time.sleep(0.001)
    return time.perf_counter() - began
