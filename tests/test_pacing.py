"""How long segments are."""

from __future__ import annotations

import pytest

from parakit.pacing import SEGMENT_SECONDS, segment_seconds


@pytest.mark.parametrize(("control", "segment"), [(0.0, 0.25), (0.005, 0.25), (0.007, 0.35), (0.01, 0.4), (1.0, 0.4)])
def test_control_takes_two_percent_up_to_a_limit(control: float, segment: float) -> None:
    assert segment_seconds(control) == pytest.approx(segment)


def test_news_come_four_times_a_second_where_control_is_cheap() -> None:
    assert SEGMENT_SECONDS == segment_seconds(0.0) == 0.25
