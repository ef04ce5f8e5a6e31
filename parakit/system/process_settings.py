"""Settings that torch keeps for a whole process, and generators of random numbers that belong to nobody.

A notebook that sets the default dtype, the precision of products or deterministic algorithms sets them for itself
alone; `Settings` takes them to where its model is trained. What a model draws from the generators of torch, numpy and
Python follows from the seed of a run: `seed_all`. Both are given back afterwards, because a process may be used by
others too.
"""

from __future__ import annotations

import pickle
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from parakit.errors import RunError
from parakit.system.devices import generators_of, seed

_PRECISIONS = (
    "", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn",
)  # fmt: skip

_WAIT_SECONDS = 60.0
_NUMPYS: Any = np.random  # the generator that users' code draws from, whose types leave some of it out

__all__ = ["Draws", "Settings", "drawing", "foreign_hooks", "seed_all", "undisturbed"]


@dataclass(frozen=True)
class Settings:
    """What torch is told for a process, and what for a block of code.

    Attributes
    ----------
    default_dtype : torch.dtype
    deterministic : tuple of bool
        Whether algorithms are to be deterministic, and whether it is enough to warn.
    precision : str or None
        Of products of float32 matrices, as torch's older interface names it; None where the newer one was used.
    precisions : tuple of str, or of bool
        The same for each of `_PRECISIONS`.
    cudnn : tuple of bool
        Whether it tries algorithms, and whether it is to be deterministic.
    anomalies : bool
        Whether backward passes look for NaN.
    autocast : torch.dtype or None
        Of an autocast on the CPU that is in force.
    """

    default_dtype: torch.dtype = torch.float32
    deterministic: tuple[bool, bool] = (False, False)
    precision: str | None = "highest"
    precisions: tuple[Any, ...] = ()
    cudnn: tuple[bool, bool] = (False, False)
    anomalies: bool = False
    autocast: torch.dtype | None = None

    @classmethod
    def here(cls) -> Settings:
        """Those of this process, and of the block of code that asks."""
        cudnn = torch.backends.cudnn
        return cls(
            torch.get_default_dtype(),
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
            _older_precision(),
            tuple(getattr(holder, name) for holder, name in _precisions()),
            (cudnn.benchmark, cudnn.deterministic),
            torch.is_anomaly_enabled(),
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        )  # fmt: skip

    def apply(self) -> None:
        """Make them those of this process, as far as they differ."""
        now = Settings.here()
        if now.default_dtype != self.default_dtype:
            torch.set_default_dtype(self.default_dtype)
        if now.deterministic != self.deterministic:
            wanted, warn = self.deterministic
            torch.use_deterministic_algorithms(wanted, warn_only=warn)
        if self.precision is not None and now.precision != self.precision:
            torch.set_float32_matmul_precision(self.precision)
        for (holder, name), wanted in zip(_precisions(), self.precisions, strict=False):
            if getattr(holder, name) != wanted:
                setattr(holder, name, wanted)
        if now.cudnn != self.cudnn:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = self.cudnn
        if now.anomalies != self.anomalies:
            torch.autograd.set_detect_anomaly(self.anomalies)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let them hold meanwhile.

        Several threads may have the same settings in force at once; others wait until those are done. What somebody
        else set meanwhile, such as a cell of the notebook, stays.

        Raises
        ------
        RunError
            If other settings are in force for too long.
        """
        with _FORCE.held(replace(self, autocast=None)), ExitStack() as block:
            enabled = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            if self.autocast is not None and enabled != self.autocast:  # of this thread alone
                block.enter_context(torch.autocast("cpu", dtype=self.autocast))
            yield

    def _without(self, mine: Settings, before: Settings) -> Settings:
        """These, with what somebody else set kept, and what is mine as it was before."""
        kept = {
            one.name: getattr(self if getattr(self, one.name) != getattr(mine, one.name) else before, one.name)
            for one in fields(self)
        }
        return replace(self, **kept)


class _Force:
    """Which settings are in force in this process, by how many holders."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: list[int] = []  # threads
        self._present: Settings | None = None
        self._before = Settings()

    @contextmanager
    def held(self, wanted: Settings) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_free_for(wanted, me), _WAIT_SECONDS):
                raise RunError(
                    f"Other settings of torch than those of this run were in force for {_WAIT_SECONDS:g} s.",
                    cause="two runs in this process, started under different settings, and a long step of one of them",
                    remedy="let one end first, or start both under the same settings",
                )
            outer, outer_before = self._present, self._before
            if not self._holders or outer != wanted:
                self._before = replace(Settings.here(), autocast=None)
                wanted.apply()
                self._present = wanted
            self._holders.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._holders.remove(me)
                if not self._holders or (outer is not None and outer != wanted):
                    replace(Settings.here(), autocast=None)._without(wanted, self._before).apply()
                    self._present, self._before = (outer, outer_before) if self._holders else (None, outer_before)
                self._changed.notify_all()

    def _is_free_for(self, wanted: Settings, me: int) -> bool:
        return not self._holders or self._present == wanted or all(holder == me for holder in self._holders)


_FORCE = _Force()


def _precisions() -> list[tuple[Any, str]]:
    """Where torch keeps precisions, one for each kind of operation; older versions have two switches instead."""
    newer = hasattr(torch.backends, "fp32_precision")
    found = []
    for path in _PRECISIONS if newer else ("cuda.matmul", "cudnn"):
        holder: Any = torch.backends
        for part in filter(None, path.split(".")):
            holder = getattr(holder, part)
        found.append((holder, "fp32_precision" if newer else "allow_tf32"))
    return found


def _older_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface was used, and torch does not mix them
        return None


@dataclass(frozen=True)
class Draws:
    """From whose generators code draws, besides torch's on its own account.

    Attributes
    ----------
    torch : bool
        From torch's.
    others : bool
        From numpy's or Python's.
    """

    torch: bool = False
    others: bool = False


class _Watch:
    """What was drawn since it was made."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[Any, Any]:
        numpys = pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002  # the one that users' code draws from
        return torch.random.get_rng_state(), (random.getstate(), numpys)

    @property
    def draws(self) -> Draws:
        now = self._now()
        return Draws(not torch.equal(now[0], self._before[0]), now[1] != self._before[1])


def drawing() -> _Watch:
    """Watch over the generators of this process: `draws` says from which there were draws since."""
    return _Watch()


def seed_all(device: torch.device, value: int, *, others: bool) -> None:
    """Seed what code draws at random: from torch, and if wanted from numpy's and Python's generators."""
    seed(device, value)
    if others:
        random.seed(value)
        np.random.seed(value % 2**32)  # noqa: NPY002
        state = _NUMPYS.get_state(legacy=False)  # of normal numbers, the second of a pair may have been kept
        _NUMPYS.set_state(state | {"has_gauss": 0, "gauss": 0.0})


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Give the generators back as they were, also where another one took the place of numpy's."""
    pythons, numpys, bits = random.getstate(), _NUMPYS.get_state(legacy=False), _NUMPYS.get_bit_generator()
    try:
        with torch.random.fork_rng(devices=generators_of(device)):
            yield
    finally:
        random.setstate(pythons)
        if _NUMPYS.get_bit_generator() is not bits:
            _NUMPYS.set_bit_generator(bits)
        _NUMPYS.set_state(numpys)


def foreign_hooks() -> int:
    """Hooks that this process calls for every module or every optimizer: they are nobody's, and do not travel."""
    modules, optimizers = torch.nn.modules.module, sys.modules["torch.optim.optimizer"]
    tables = [getattr(modules, name) for name in vars(modules) if name.startswith("_global_") and "hook" in name]
    tables += [getattr(optimizers, f"_global_optimizer_{when}_hooks", {}) for when in ("pre", "post")]
    return sum(len(table) for table in tables if isinstance(table, dict))
