"""How workers lie on hosts, and which ways of adding up that allows; knows addresses alone, not what uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

__all__ = ["equal_counts", "hierarchical"]


def hierarchical(hosts: Sequence[str]) -> bool:
    """Whether there are several hosts, and several workers on one of them: then sums are made within hosts first.

    Parameters
    ----------
    hosts : sequence of str
        Of each worker; equal ones are one host.
    """
    return 1 < len(set(hosts)) < len(hosts)


def equal_counts(hosts: Sequence[str]) -> bool:
    """Whether all hosts have as many workers, so that each has a peer on every host, and an update can be divided."""
    return len(set(Counter(hosts).values())) <= 1
