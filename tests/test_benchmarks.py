"""Benchmarks: their tables, their picture, and the rivals that wait for orders. What they time is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.benchmarks import pictures, step_time
from tests.benchmarks.__main__ import NAMES, markdown
from tests.benchmarks.reports import Report, heading, load, significant, spread
from tests.benchmarks.rivals import rival

PAIRS = {"MLP": {step_time.PARAKIT: [10.0, 12.0], "plain, 1 thread": [20.0, 12.0], "plain, 1 thread, tuned": [5.0, 6.0],
                 "DDP, 2 processes": [30.0, 36.0], "DDP, 2 processes, tuned": [11.0, 12.0]}}  # fmt: skip
REPORT = Report("step_time", "Steps", ["workload", "ms"], [["MLP", "1"], ["CNN", "23"]], ["A remark."], PAIRS)


def test_a_report_is_text_markdown_and_json(tmp_path: Path) -> None:
    assert REPORT.text() == "Steps\n\nworkload  ms\nMLP        1\nCNN       23\nA remark.\n"
    assert "| workload | ms |\n| --- | --: |\n| MLP | 1 |" in REPORT.markdown()
    path = tmp_path / "found.json"
    assert load(path) == []
    path.write_text(json.dumps([asdict(REPORT)]))
    assert load(path) == [REPORT]


@pytest.mark.parametrize(
    ("value", "told"), [(0, "0"), (0.012345, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (123456, "123,000")]
)
def test_numbers_have_three_digits(value: float, told: str) -> None:
    assert significant(value) == told
    assert spread([value] * 3) == f"{told} ({told} to {told})"


def test_ratios_are_taken_within_repeats_and_over_the_best_rival() -> None:
    assert step_time.ratios(PAIRS["MLP"], "plain, 1 thread") == [2.0, 1.0]
    (row,) = step_time.summary(REPORT).rows
    assert [cell.split()[0] for cell in row[3:]] == ["1.50", "0.500", "3.00", "1.05"]
    threads = PAIRS["MLP"] | {step_time.PARAKIT_ALONE: [5.0, 4.0]}
    assert step_time.best(PAIRS["MLP"]) == step_time.PARAKIT
    assert step_time.best(threads) == step_time.PARAKIT_ALONE
    assert step_time.ratios(threads, "plain, 1 thread") == [4.0, 3.0]
    assert markdown([REPORT]).startswith(f"On {heading()}; median (quartiles).\n\n**Times over parakit's**")


def test_what_has_a_picture_is_drawn(tmp_path: Path) -> None:
    cases = {"cases": [[2, 1000, {"gloo": 0.5, "in place": 0.1}], [2, 10**6, {"gloo": 5.0, "in place": 1.0}]]}
    counts = {"1": 1.0, "2": 2.0}
    others = [Report("all_reduce", "", [], [], [], cases), Report("by_workers", "", [], [], [], counts)]
    reports = [REPORT, *others, Report("starting", "", [], [])]
    for number, some in enumerate((reports, [])):
        pictures.draw(some, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("kind", ["plain", "ddp"])
def test_a_rival_answers_and_ends(kind: str, nothing_left: None) -> None:
    with rival(kind, 0, 1, tuned=True) as opened:
        assert 0 < opened.step_seconds(0.05) < 60
        assert opened.process.poll() is None
    assert opened.process.returncode is not None


def test_a_rival_that_cannot_start_is_not_waited_for(nothing_left: None) -> None:
    with pytest.raises(AssertionError, match="a rival ended as it started"), rival("plain", 0, -1):
        pass


@pytest.mark.parametrize("name", [*NAMES, "resize", "panel_overhead", "coverage"])
def test_every_benchmark_can_be_asked_alone(name: str) -> None:
    assert Path(__file__).with_name("benchmarks").joinpath(f"{name}.py").exists()


def test_an_unknown_benchmark_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "speed"], cwd=Path(__file__).parents[1], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "there is no benchmark speed" in done.stderr
