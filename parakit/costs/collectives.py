"""How long an exchange takes: the time of an all-reduce by algorithm, in the latency-bandwidth model of Hockney.

Pure formulas, vectorised in the number of workers. They know nothing of contention between messages, of topology, nor
of computing at the same time; a message of m bytes takes latency + m times seconds per byte. Every algorithm costs one
worker nothing, but the parameter server, with which a single worker exchanges too.

References
----------
Thakur, Rabenseifner, Gropp: "Optimization of collective communication operations in MPICH", Int. J. High Perform.
Comput. Appl. 19 (2005) 49. Patarasuk, Yuan: "Bandwidth optimal all-reduce algorithms for clusters of workstations",
J. Parallel Distrib. Comput. 69 (2009) 117.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.errors import InputError, WorkerCountError

__all__ = [
    "ALGORITHMS",
    "Link",
    "all_reduce_seconds",
    "binomial_tree",
    "find_algorithm",
    "halving_doubling",
    "hierarchical",
    "lower_bound",
    "parameter_server",
    "pipelined_tree",
    "recursive_doubling",
    "ring",
    "shared_memory",
]  # fmt: skip

Floats = npt.NDArray[np.float64]
#: A number of workers, or an array of them.
Counts = Any


@dataclass(frozen=True)
class Link:
    """What a message costs.

    Parameters
    ----------
    latency_seconds : float
        Of a message, whatever its length; alpha in the formulas.
    seconds_per_byte : float
        Of a message, one over the bandwidth; beta.
    reduce_seconds_per_byte : float
        Of adding what came to what is here; gamma. 0 where the bandwidth was measured with it.
    shared_seconds_per_byte : float
        Of a medium through which the bytes of all workers pass, such as the memory of a host; 0 for none.
    """

    latency_seconds: float
    seconds_per_byte: float
    reduce_seconds_per_byte: float = 0.0
    shared_seconds_per_byte: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} of a link is {value!r}; it must be a finite number of at least 0.")

    def message_seconds(self, nbytes: Any) -> Any:
        """Time of one message."""
        return self.latency_seconds + nbytes * self.seconds_per_byte


def worker_counts(n: Counts) -> Floats:
    """Numbers of workers as an array of floats.

    Raises
    ------
    WorkerCountError
        If one of them is below 1 or no number.
    """
    try:
        counts = np.asarray(n, np.float64)
    except (TypeError, ValueError) as error:
        raise WorkerCountError(f"A number of workers is {n!r}, which is no number.") from error
    if not np.all(np.isfinite(counts)) or np.any(counts < 1):
        raise WorkerCountError(f"A number of workers is {n!r}; it must be at least 1.", remedy="count from 1")
    return counts


def like_given(n: Counts, values: Any) -> Any:
    """A float where one number of workers was asked for, an array where several were."""
    return float(values) if np.ndim(n) == 0 else np.asarray(values, np.float64)


def _rounds_up(counts: Floats) -> Floats:
    """Rounds in which a message reaches all, if all that have it pass it on: log2 N, rounded up."""
    return np.ceil(np.log2(counts) - 1e-9)


def _rounds_down(counts: Floats) -> Floats:
    return np.floor(np.log2(counts) + 1e-9)


def _odd_ones(counts: Floats) -> Floats:
    """1 where N is no power of two, so that some must hand their part to a neighbour first; else 0."""
    return np.asarray(_rounds_up(counts) > _rounds_down(counts), np.float64)


def ring(n: Counts, nbytes: float, link: Link) -> Any:
    """Reduce-scatter and all-gather round a ring: the bandwidth of the lower bound, latency that grows with N.

    T = 2 (N - 1) alpha + 2 (N - 1) / N n beta + (N - 1) / N n gamma (Patarasuk, Yuan 2009).

    Parameters
    ----------
    n : int or array
        Workers.
    nbytes : float
        Bytes that each worker has to add.
    link : Link

    Returns
    -------
    float, or float64 array of the shape of n
        Seconds.

    Raises
    ------
    WorkerCountError
        If a number of workers is below 1. All algorithms here raise it.
    """
    counts = worker_counts(n)
    part = nbytes * (counts - 1) / counts
    seconds = 2 * (counts - 1) * link.latency_seconds + part * (
        2 * link.seconds_per_byte + link.reduce_seconds_per_byte
    )
    return like_given(n, seconds)


def recursive_doubling(n: Counts, nbytes: float, link: Link) -> Any:
    """Pairs at distance 1, 2, 4... swap everything: fewest messages, most bytes; best for small models.

    T = log2 N (alpha + n beta + n gamma) for a power of two (Thakur et al. 2005). Otherwise those beyond the largest
    power of two hand in their part before, and get the sum after: 2 (alpha + n beta) + n gamma more.
    """
    counts = worker_counts(n)
    swap, add = link.message_seconds(nbytes), nbytes * link.reduce_seconds_per_byte
    return like_given(n, _rounds_down(counts) * (swap + add) + _odd_ones(counts) * (2 * swap + add))


def halving_doubling(n: Counts, nbytes: float, link: Link) -> Any:
    """Rabenseifner's algorithm, reduce-scatter by halves and all-gather by doubling: few messages and few bytes.

    T = 2 log2 P alpha + (P - 1) / P n (2 beta + gamma), with P the largest power of two up to N; where that is not N,
    2 (alpha + n beta) + n gamma more (Thakur et al. 2005).
    """
    counts = worker_counts(n)
    rounds = _rounds_down(counts)
    part = nbytes * (1 - 2**-rounds)
    core = 2 * rounds * link.latency_seconds + part * (2 * link.seconds_per_byte + link.reduce_seconds_per_byte)
    extra = 2 * link.message_seconds(nbytes) + nbytes * link.reduce_seconds_per_byte
    return like_given(n, core + _odd_ones(counts) * extra)


def binomial_tree(n: Counts, nbytes: float, link: Link) -> Any:
    """Reduce to one worker up a tree of messages, and send the sum down again.

    T = ceil(log2 N) (2 alpha + 2 n beta + n gamma) (Thakur et al. 2005, reduce and broadcast of short messages).
    """
    counts = worker_counts(n)
    each = 2 * link.message_seconds(nbytes) + nbytes * link.reduce_seconds_per_byte
    return like_given(n, _rounds_up(counts) * each)


def pipelined_tree(n: Counts, nbytes: float, link: Link, *, pieces: int | None = None) -> Any:
    """A tree through which pieces of the message follow each other: latency grows with log N, bandwidth hardly.

    T = 2 (ceil(log2 N) + k - 1) (alpha + n / k beta) + (ceil(log2 N) + k - 1) n / k gamma with k pieces; the best k is
    sqrt((ceil(log2 N) - 1) n beta / alpha). Two trees at once (Sanders, Speck, Träff 2009) come nearer to the bound.

    Parameters
    ----------
    n : int or array
    nbytes : float
    link : Link
    pieces : int, optional
        Default: the best number for each N, at most one a kilobyte.
    """
    counts = worker_counts(n)
    depth = _rounds_up(counts)
    most = max(1.0, nbytes / 1024)
    if pieces is not None:
        chosen = np.full_like(counts, pieces)
    elif link.latency_seconds == 0:
        chosen = np.full_like(counts, most)
    else:
        per_piece = nbytes * (link.seconds_per_byte + link.reduce_seconds_per_byte / 2) / link.latency_seconds
        chosen = np.clip(np.round(np.sqrt(np.maximum(depth - 1, 0) * per_piece)), 1, most)
    length = nbytes / chosen
    each = 2 * link.message_seconds(length) + length * link.reduce_seconds_per_byte
    return like_given(n, np.where(depth > 0, (depth + chosen - 1) * each, 0.0))


def parameter_server(n: Counts, nbytes: float, link: Link, *, servers: int = 1) -> Any:
    """Every worker sends its gradient to the servers that share the parameters, and gets parameters back.

    T = 2 alpha + 2 max(n beta, N n beta / s) + N n gamma / s: the workers' links or those of the s servers, whichever
    take longer (after Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014). A single
    worker exchanges with its server too.
    """
    if isinstance(servers, bool) or not isinstance(servers, int) or servers < 1:
        raise InputError(f"servers is {servers!r}; it must be a whole number of at least 1.")
    counts = worker_counts(n)
    load = nbytes * counts / servers
    wire = 2 * np.maximum(nbytes, load) * link.seconds_per_byte
    return like_given(n, 2 * link.latency_seconds + wire + load * link.reduce_seconds_per_byte)


def shared_memory(n: Counts, nbytes: float, link: Link) -> Any:
    """Workers of one host: each adds its slice over all workers' buffers, between two barriers.

    T = 2 ceil(log2 N) alpha + n max(beta + gamma, N beta_shared): a worker reads N slices of n / N bytes at its own
    pace, unless the memory that all read from is slower. alpha is a round of a barrier.
    """
    counts = worker_counts(n)
    pace = np.maximum(
        link.seconds_per_byte + link.reduce_seconds_per_byte, counts * link.shared_seconds_per_byte
    )  # fmt: skip
    seconds = 2 * _rounds_up(counts) * link.latency_seconds + nbytes * pace
    return like_given(n, np.where(counts > 1, seconds, 0.0))


def hierarchical(
    n: Counts, nbytes: float, link: Link, *, within: Link, workers_per_node: int, ports: int | None = None,
    algorithm: str = "ring",
) -> Any:  # fmt: skip
    """Reduce-scatter within nodes, all-reduce of the slices between nodes, all-gather within nodes; rings throughout.

    With g workers a node and k nodes: within, 2 (g - 1) alpha + (g - 1) / g n (2 beta + gamma); between, a ring of k
    over n / g bytes, of which g are under way at once through the ports of a node.

    Parameters
    ----------
    n : int or array
    nbytes : float
    link, within : Link
        Between nodes, and within one.
    workers_per_node : int
    ports : int, optional
        Network ports of a node; workers share them. Default: one a worker.
    algorithm : {"ring", "shared memory"}
        Within a node, where it takes the place of the first and the last ring.
    """
    counts = worker_counts(n)
    group = np.minimum(counts, workers_per_node)
    nodes = np.ceil(counts / group - 1e-9)
    sharing = np.maximum(1.0, group / (ports or workers_per_node))
    slices = nbytes / group
    between = 2 * (nodes - 1) * link.latency_seconds + (nodes - 1) / nodes * slices * (
        2 * sharing * link.seconds_per_byte + link.reduce_seconds_per_byte
    )
    return like_given(n, np.asarray(all_reduce_seconds(algorithm, group, nbytes, within)) + between)


def lower_bound(n: Counts, nbytes: float, link: Link) -> Any:
    """What no all-reduce can beat: the larger of ceil(log2 N) alpha and 2 (N - 1) / N n beta (Chan et al. 2007)."""
    counts = worker_counts(n)
    wire = 2 * nbytes * (counts - 1) / counts * link.seconds_per_byte
    return like_given(n, np.maximum(_rounds_up(counts) * link.latency_seconds, wire))


#: Algorithms that need a single kind of link, by name.
ALGORITHMS: dict[str, Callable[..., Any]] = {
    "ring": ring,
    "recursive doubling": recursive_doubling,
    "halving-doubling": halving_doubling,
    "binomial tree": binomial_tree,
    "pipelined tree": pipelined_tree,
    "parameter server": parameter_server,
    "shared memory": shared_memory,
    "lower bound": lower_bound,
}


def find_algorithm(name: str) -> str:
    """The name of an algorithm as `ALGORITHMS` has it, found whatever its case, hyphens and underscores.

    Raises
    ------
    InputError
        If there is none of this name; the message lists them.
    """
    wanted = _plain(name) if isinstance(name, str) else None
    for known in ALGORITHMS:
        if _plain(known) == wanted:
            return known
    raise InputError(
        f"There is no exchange algorithm {name!r}.", remedy=f"choose one of {', '.join(map(repr, ALGORITHMS))}"
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", " ").replace("_", " ")


def all_reduce_seconds(algorithm: str, n: Counts, nbytes: float, link: Link, **options: Any) -> Any:
    """Time of an all-reduce by an algorithm of a name.

    Parameters
    ----------
    algorithm : str
        One of `ALGORITHMS`.
    n : int or array
        Workers.
    nbytes : float
        Bytes that each worker has to add.
    link : Link
    **options
        Of that algorithm, such as servers=2.

    Returns
    -------
    float, or float64 array of the shape of n
        Seconds.

    Examples
    --------
    >>> from parakit.costs.collectives import Link, all_reduce_seconds
    >>> gigabit = Link(latency_seconds=50e-6, seconds_per_byte=8e-9)
    >>> round(all_reduce_seconds("ring", 4, 4_000_000, gigabit), 4)
    0.0483
    """
    return ALGORITHMS[find_algorithm(algorithm)](n, nbytes, link, **options)
