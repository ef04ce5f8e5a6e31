"""A picture of what the benchmarks found: what there is, one plot beside the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import numpy as np
from matplotlib import pyplot as plt

from tests.benchmarks import step_time
from tests.benchmarks.reports import Report, heading, median


def draw(reports: list[Report], path: Path) -> None:
    """Draw the reports that have a picture into a PNG file."""
    drawn = [report for report in reports if report.name in PLOTS]
    figure, axes = plt.subplots(1, max(1, len(drawn)), figsize=(6.5 * max(1, len(drawn)), 4.5), squeeze=False)
    for report, axis in zip(drawn, axes[0], strict=False):
        PLOTS[report.name](report, axis)
    if not drawn:
        axes[0][0].axis("off")
    figure.suptitle(heading(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _step_time(report: Report, axis: Any) -> None:
    """Times over parakit's, a group of bars a workload; quartiles as whiskers."""
    names = list(report.figures)
    ways = [way for way in report.figures[names[0]] if not way.startswith("parakit")]
    width = 0.8 / len(ways)
    for number, way in enumerate(ways):
        found = [np.percentile(step_time.ratios(report.figures[name], way), [25, 50, 75]) for name in names]
        low, middle, high = np.array(found).T
        places = np.arange(len(names)) + (number - (len(ways) - 1) / 2) * width
        colour = f"C{number % (len(ways) // 2)}"
        axis.bar(places, middle, width, color=colour, alpha=0.55 if way.endswith("tuned") else 1.0, label=way)
        axis.errorbar(places, middle, (middle - low, high - middle), fmt="none", ecolor="black", lw=0.8, capsize=2)
    axis.axhline(1, color="black", lw=1)
    axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
    axis.set_ylabel("time of a step over parakit's (above 1: parakit is faster)", fontsize=8)
    axis.set_title("Step; parakit's faster layout is 1")
    axis.set_ylim(top=1.25 * axis.get_ylim()[1])  # for the legend
    axis.legend(fontsize=7, ncols=2, loc="upper left")


def _all_reduce(report: Report, axis: Any) -> None:
    cases = report.figures["cases"]
    for size in sorted({case[0] for case in cases}):
        for way, style in (("gloo", "--"), ("in place", "-")):
            found = [(case[1], case[2][way]) for case in cases if case[0] == size]
            axis.plot(*zip(*found, strict=True), style, marker="o", ms=3, color=f"C{size // 2 - 1}",
                      label=f"{size} workers, {'shared memory' if way == 'in place' else way}")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="bytes", ylabel="ms", title="All-reduce on one host")
    axis.legend(fontsize=7)


def _by_workers(report: Report, axis: Any) -> None:
    counts = [int(count) for count in report.figures]
    axis.plot(counts, list(report.figures.values()), marker="o")
    axis.set(xlabel="workers", ylabel="ms a step", title="A step that computes nearly nothing", xscale="log")
    axis.minorticks_off()
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_ylim(0, 1.2 * max(median([value]) for value in report.figures.values()))


PLOTS: dict[str, Callable[[Report, Any], None]] = {
    "step_time": _step_time, "all_reduce": _all_reduce, "by_workers": _by_workers,
}  # fmt: skip
