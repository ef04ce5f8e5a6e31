"""Settings of a process hold where a model is trained, and are given back; so are generators of random numbers."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from parakit.system.devices import CPU
from parakit.system.process_settings import Draws, Settings, drawing, foreign_hooks, seed_all, undisturbed

newer = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="an older torch")


BACKENDS: Any = torch.backends
HOLDERS = [BACKENDS, BACKENDS.cuda.matmul, BACKENDS.cudnn, BACKENDS.mkldnn] + [
    getattr(backend, name)
    for backend, names in ((BACKENDS.cudnn, ("conv", "rnn")), (BACKENDS.mkldnn, ("matmul", "conv", "rnn")))
    for name in names
    if hasattr(backend, name)
]


def put_back(before: Settings, precisions: list[Any]) -> None:
    """Give this process settings that it had, by torch's own functions."""
    torch.set_default_dtype(before.default_dtype)
    torch.use_deterministic_algorithms(before.deterministic[0], warn_only=before.deterministic[1])
    if before.precision is not None and before != Settings.here():
        torch.set_float32_matmul_precision(before.precision)
    for holder, value in zip(HOLDERS, precisions, strict=True):
        if value is not None and holder.fp32_precision != value:
            holder.fp32_precision = value
    BACKENDS.cudnn.benchmark, BACKENDS.cudnn.deterministic = before.cudnn
    torch.autograd.set_detect_anomaly(before.anomalies)


@dataclasses.dataclass(frozen=True)
class Usual:
    """The settings of this process before a test."""

    settings: Settings
    precisions: list[Any]

    def restore(self) -> None:
        put_back(self.settings, self.precisions)


@pytest.fixture(autouse=True)
def usual() -> Iterator[Usual]:
    """They are given back, whatever a test does."""
    before = Usual(Settings.here(), [getattr(holder, "fp32_precision", None) for holder in HOLDERS])
    yield before
    before.restore()
    assert Settings.here() == before.settings


# --- each setting: how a user sets it, and how one sees it


def deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


SET: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any]] = {
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype, torch.float64),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True), deterministic, (True, False)),
    "deterministic, with a warning": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True), deterministic, (True, True),
    ),
    "precision of products": (
        lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision, "medium",
    ),
    "anomalies": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled, True),
    "tried algorithms": (
        lambda: setattr(torch.backends.cudnn, "benchmark", True), lambda: torch.backends.cudnn.benchmark, True,
    ),
    "cudnn's deterministic ones": (
        lambda: setattr(torch.backends.cudnn, "deterministic", True), lambda: torch.backends.cudnn.deterministic, True,
    ),
}  # fmt: skip
NEWER: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any]] = {
    f"fp32_precision of {path or 'everything'}": (
        lambda holder=holder, value=value: setattr(holder, "fp32_precision", value),  # type: ignore[misc]
        lambda holder=holder: holder.fp32_precision,  # type: ignore[misc]
        value,
    )
    for path, (holder, value) in {
        "": (torch.backends, "tf32"),
        "cuda.matmul": (torch.backends.cuda.matmul, "tf32"),
        "cudnn": (torch.backends.cudnn, "tf32"),
        "cudnn.conv": (getattr(torch.backends.cudnn, "conv", None), "ieee"),
        "mkldnn": (torch.backends.mkldnn, "bf16"),
        "mkldnn.matmul": (getattr(torch.backends.mkldnn, "matmul", None), "bf16"),
    }.items()
}
ALL = [pytest.param(*case, id=name) for name, case in SET.items()] + [
    pytest.param(*case, id=name, marks=newer) for name, case in NEWER.items()
]
quiet = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Please use the new API")


def of_a_user(setting: Callable[[], Any], usual: Usual) -> Settings:
    """Settings as a notebook has them that made one; this process has its own again."""
    setting()
    found = Settings.here()
    usual.restore()
    return found


@quiet
@pytest.mark.parametrize(("setting", "look", "value"), ALL)
def test_a_setting_holds_meanwhile(
    setting: Callable[[], Any], look: Callable[[], Any], value: Any, usual: Usual
) -> None:
    before = look()
    settings = of_a_user(setting, usual)
    assert look() == before
    with settings.in_force():
        assert look() == value
    assert Settings.here() == usual.settings


@quiet
@pytest.mark.parametrize(("setting", "look", "value"), ALL)
def test_it_is_given_back_after_an_error(
    setting: Callable[[], Any], look: Callable[[], Any], value: Any, usual: Usual
) -> None:
    before = look()
    settings = of_a_user(setting, usual)
    with pytest.raises(RuntimeError, match="halfway"), settings.in_force():
        fail()
    assert look() == before
    assert Settings.here() == usual.settings


def fail() -> None:
    raise RuntimeError("halfway")


@quiet
@pytest.mark.parametrize(("setting", "look", "value"), ALL)
def test_a_process_that_has_set_it_already_is_set_back_meanwhile(
    setting: Callable[[], Any], look: Callable[[], Any], value: Any, usual: Usual
) -> None:
    before = look()
    setting()
    with usual.settings.in_force():
        assert look() == before
    assert look() == value


@quiet
@pytest.mark.parametrize(("setting", "look", "value"), ALL)
def test_settings_travel(setting: Callable[[], Any], look: Callable[[], Any], value: Any, usual: Usual) -> None:
    settings = of_a_user(setting, usual)
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings != usual.settings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_in_force_is_a_setting(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype):
        settings = Settings.here()
    assert settings.autocast == dtype
    assert not torch.is_autocast_enabled("cpu")
    with settings.in_force():
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert not torch.is_autocast_enabled("cpu")


def test_it_ends_with_an_error_too() -> None:
    settings = dataclasses.replace(Settings.here(), autocast=torch.bfloat16)
    with pytest.raises(RuntimeError, match="halfway"), settings.in_force():
        fail()
    assert not torch.is_autocast_enabled("cpu")


def test_an_autocast_switched_off_is_none() -> None:
    with torch.autocast("cpu", enabled=False):
        assert Settings.here().autocast is None


@newer
def test_the_newer_interface_alone_is_told_as_such(usual: Usual) -> None:
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    matmul.fp32_precision = "ieee"  # torch's older interface has no name for the two
    mixed = Settings.here()
    usual.restore()
    with mixed.in_force():
        assert (torch.backends.cuda.matmul.fp32_precision, matmul.fp32_precision) == (
            "tf32", "ieee",
        )  # fmt: skip


def test_nested_settings_are_given_back_in_turn(usual: Usual) -> None:
    with dataclasses.replace(usual.settings, default_dtype=torch.float64).in_force():
        with dataclasses.replace(usual.settings, default_dtype=torch.bfloat16).in_force():
            assert torch.get_default_dtype() == torch.bfloat16
        assert torch.get_default_dtype() == torch.float64
    assert torch.get_default_dtype() == torch.float32


# --- generators

GENERATORS = ["torch", "numpy", "numpy, half a pair", "python"]


def draw(what: str) -> Any:
    """Some numbers out of a process-wide generator."""
    if what == "torch":
        return torch.rand(3).tolist()
    if what == "python":
        return [random.random() for _ in range(3)]
    if what == "numpy, half a pair":  # normal numbers come in pairs, of which the second is kept
        return [np.random.normal() for _ in range(3)]  # noqa: NPY002
    return np.random.rand(3).tolist()  # noqa: NPY002


@pytest.fixture(params=[None, np.random.PCG64, np.random.SFC64], ids=["usual", "PCG64", "SFC64"])
def bits(request: pytest.FixtureRequest) -> Iterator[None]:
    """What numpy's process-wide generator takes its bits from: its own, or what a user has put there."""
    numpys: Any = np.random
    own = numpys.get_bit_generator()
    if request.param is not None:
        numpys.set_bit_generator(request.param(3))
    with undisturbed(CPU):
        yield
    numpys.set_bit_generator(own)


@pytest.mark.parametrize("what", GENERATORS)
def test_generators_are_given_back_as_they_were(what: str, bits: None) -> None:
    seed_all(CPU, 3, others=True)
    draw(what)
    with undisturbed(CPU):
        expected = draw(what)
        draw(what)
    assert draw(what) == expected


@pytest.mark.parametrize("what", GENERATORS)
def test_also_after_an_error(what: str, bits: None) -> None:
    draw(what)
    with undisturbed(CPU):
        expected = draw(what)

    def half() -> None:
        seed_all(CPU, 99, others=True)
        draw(what)
        fail()

    with pytest.raises(RuntimeError, match="halfway"), undisturbed(CPU):
        half()
    assert draw(what) == expected


@pytest.mark.parametrize("what", ["torch", "numpy", "python"])
def test_a_seed_says_what_is_drawn(what: str, bits: None) -> None:
    drawn = []
    for seed in (7, 8, 7):
        seed_all(CPU, seed, others=True)
        drawn.append(draw(what))
    assert drawn[0] == drawn[2] != drawn[1]


def test_others_are_seeded_where_they_are_wanted_alone(bits: None) -> None:
    seed_all(CPU, 7, others=True)
    before = draw("numpy"), draw("python")
    seed_all(CPU, 7, others=True)
    seed_all(CPU, 8, others=False)
    assert (draw("numpy"), draw("python")) == before


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 + 5, 2**63 - 1])
def test_seeds_of_any_size_are_taken(seed: int, bits: None) -> None:
    seed_all(CPU, seed, others=True)
    one = [draw(what) for what in ("torch", "numpy", "python")]
    seed_all(CPU, seed, others=True)
    assert [draw(what) for what in ("torch", "numpy", "python")] == one


def test_a_half_pair_of_normal_numbers_is_forgotten(bits: None) -> None:
    with undisturbed(CPU):
        seed_all(CPU, 7, others=True)
        expected = draw("numpy, half a pair")
        seed_all(CPU, 7, others=True)
        assert draw("numpy, half a pair") == expected


@pytest.mark.parametrize("draws", [0, 1, 2])
def test_nothing_that_was_drawn_before_a_seed_matters_after_it(draws: int, bits: None) -> None:
    drawn = []
    for count in (0, draws):
        seed_all(CPU, 7, others=True)
        for _ in range(count):
            np.random.normal()  # noqa: NPY002
        seed_all(CPU, 7, others=True)
        drawn.append(draw("numpy, half a pair"))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("other", [np.random.PCG64, np.random.SFC64, np.random.MT19937])
@pytest.mark.parametrize("error", [False, True])
def test_a_bit_generator_that_is_put_in_meanwhile_is_taken_out(other: Any, error: bool, bits: None) -> None:
    numpys: Any = np.random
    own = numpys.get_bit_generator()
    np.random.normal()  # noqa: NPY002  # and the second of a pair is there again
    with undisturbed(CPU):
        expected = draw("numpy, half a pair")

    def put_in() -> None:
        numpys.set_bit_generator(other(3))
        draw("numpy, half a pair")
        if error:
            fail()

    with pytest.raises(RuntimeError, match="halfway") if error else nullcontext(), undisturbed(CPU):
        put_in()
    assert numpys.get_bit_generator() is own
    assert draw("numpy, half a pair") == expected


@pytest.mark.parametrize(
    ("what", "draws"),
    [("torch", Draws(torch=True)), ("numpy", Draws(others=True)), ("python", Draws(others=True)), (None, Draws())],
)
def test_it_is_seen_who_draws(what: str | None, draws: Draws, bits: None) -> None:
    watch = drawing()
    if what is not None:
        draw(what)
    assert watch.draws == draws


def test_a_pair_that_is_used_up_is_a_draw() -> None:
    np.random.seed(3)  # noqa: NPY002
    np.random.normal()  # noqa: NPY002
    watch = drawing()
    np.random.normal()  # noqa: NPY002  # the second of a pair: no bits are drawn for it
    assert watch.draws == Draws(others=True)


def test_generators_of_ones_own_are_not_watched() -> None:
    watch, own = drawing(), (torch.Generator().manual_seed(3), np.random.default_rng(3), random.Random(3))
    torch.rand(3, generator=own[0])
    own[1].random(3)
    own[2].random()
    assert watch.draws == Draws()


# --- hooks of a whole process


def test_hooks_for_every_module_are_counted() -> None:
    before = foreign_hooks()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert foreign_hooks() == before + 1
    finally:
        handle.remove()
    assert foreign_hooks() == before


def test_hooks_for_every_optimizer_too() -> None:
    before = foreign_hooks()
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        assert foreign_hooks() == before + 1
    finally:
        handle.remove()
