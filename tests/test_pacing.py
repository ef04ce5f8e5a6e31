"""How long segments are."""

from __future__ import annotations

import math

import pytest

from parakit.pacing import NEWS_SECONDS, SEGMENT_SECONDS, segment_seconds


@pytest.mark.parametrize(("control", "segment"), [(0.0, 0.25), (0.0015, 0.25), (0.003, 0.5), (0.005, 0.8), (1.0, 0.8)])
def test_a_segment_is_longer_where_control_would_cost_much(control: float, segment: float) -> None:
    assert segment_seconds(control) == pytest.approx(segment, abs=0.04)
    assert segment_seconds(control, math.inf) == segment_seconds(control)


@pytest.mark.parametrize("control", [0.0, 0.001, 0.005, 1.0])
def test_who_watches_has_news_twice_a_second(control: float) -> None:
    assert segment_seconds(control, NEWS_SECONDS) == min(segment_seconds(control), NEWS_SECONDS)
    assert NEWS_SECONDS <= 0.5


def test_news_come_four_times_a_second_where_control_is_cheap() -> None:
    assert SEGMENT_SECONDS == segment_seconds(0.0) == segment_seconds(0.0, 0.01) == 0.25
