"""The short form of the soak; `make soak` is the long one."""

from __future__ import annotations

import pytest

from tests.soak import soak, table


@pytest.mark.dask
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_after_random_faults_every_run_ends_as_if_nothing_had_happened() -> None:
    tally = soak(faults=5, seed=3, seconds=120)
    print(table(tally, 3))
    assert tally.wrong == []
    assert sum(tally.faults.values()) >= 5
    assert tally.faults["killed"] >= 1
    assert tally.recoveries >= 1
