"""The study that a sweep returns: known speedups, round trips, and what cannot be."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from parakit.errors import InputError
from parakit.events.history import History
from parakit.events.records import PHASES, GradientNorms, Resized, RunStart, SegmentDone, StepDone, WorkerStep
from parakit.scaling.laws.laws import karp_flatt
from parakit.scaling.study.records import About, Measurement, rows, spread_of
from parakit.scaling.study.study import Scaling

ABOUT = About(batch_size=256, parameters=650, strategy="AllReduce()", pool="4 local processes", machine="a <fast> CPU",
              cores=4, counts=(1, 2, 4), repeats=3)  # fmt: skip
# Every block is disturbed in its own way, which all that was measured in it suffers alike.
WEATHER = (1.0, 0.5, 0.8)
SPEEDUPS = {1: 1.0, 2: 1.9, 4: 3.2}
PHASE_SECONDS = (0.001, 0.002, 0.004, 0.001, 0.0005, 0.0)


def measured(workers: int, block: int, rate: float, **more: Any) -> Measurement:
    given = {"step_seconds": 0.1, "steps": 5, "seconds": 0.5, "cores": 4} | more
    return Measurement(workers, block, block, rate, **given)


def plainly(threads: int, block: int, rate: float) -> Measurement:
    return measured(0, block, rate, kind="plain", threads=threads)


def measurements() -> list[Measurement]:
    found = []
    for block, weather in enumerate(WEATHER):
        for workers, speedup in SPEEDUPS.items():
            found.append(measured(workers, block, 1000 * speedup * weather, breakdown=PHASE_SECONDS, at_seconds=block))
        found += [plainly(1, block, 1250 * weather), plainly(4, block, 2000 * weather)]
    return found


def study(**more: Any) -> Scaling:
    return Scaling(measurements(), ABOUT, **more)


def test_known_speedups_come_out_whatever_disturbed_whole_blocks() -> None:
    made = study()
    for workers, speedup in SPEEDUPS.items():
        found = made.speedup(workers)
        assert (found.median, found.low, found.high) == pytest.approx((speedup,) * 3)
        assert found.count == 3
        assert made.efficiency(workers) == pytest.approx(speedup / workers)
    two = made.row(2)
    assert two.rate.median == pytest.approx(1900 * 0.8)
    assert (two.rate.low, two.rate.high) == pytest.approx((1900 * 0.65, 1900 * 0.9))
    assert [(name, over.median) for name, over in two.over_plain.items()] == [
        ("plain PyTorch, 1 core", pytest.approx(1900 / 1250)),
        ("plain PyTorch, 4 cores", pytest.approx(0.95)),
    ]


def test_karp_flatt_is_the_serial_fraction_of_amdahl() -> None:
    for serial in (0.0, 0.05, 0.3, 1.0):
        for workers in (2, 7, 64):
            assert karp_flatt(1 / (serial + (1 - serial) / workers), workers) == pytest.approx(serial)
    assert math.isnan(karp_flatt(1.0, 1))
    assert study().row(4).karp_flatt == pytest.approx((1 / 3.2 - 1 / 4) / (1 - 1 / 4))
    weak = Scaling(measurements(), replace(ABOUT, mode="weak"))
    assert math.isnan(weak.row(4).karp_flatt)


def test_without_a_common_block_rates_are_compared_with_the_median() -> None:
    found = rows([measured(1, 0, 100.0), measured(1, 1, 300.0), measured(2, 2, 400.0)])
    assert found[1].speedup.median == pytest.approx(2.0)


def test_spreads_leave_out_what_is_no_number() -> None:
    assert spread_of([1.0, math.nan, 3.0]).median == 2.0
    assert math.isnan(spread_of([]).median)


def test_measurements_are_sorted_by_count_and_baselines_by_threads() -> None:
    made = Scaling(reversed(measurements()), ABOUT)
    assert made.workers == (1, 2, 4)
    assert list(made.baselines) == ["plain PyTorch, 1 core", "plain PyTorch, 4 cores"]
    assert made.baselines["plain PyTorch, 1 core"].median == pytest.approx(1000)


def test_records_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        measurements()[0].rate = 1.0  # type: ignore[misc]
    assert measurements()[0].phases == dict(zip(PHASES, PHASE_SECONDS, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", 0.0), ("rate", -1.0), ("rate", math.nan), ("rate", math.inf), ("rate", True), ("rate", "fast"),
        ("step_seconds", 0.0), ("seconds", math.nan), ("workers", True), ("workers", 1.5), ("workers", -1),
        ("workers", 0), ("steps", 0), ("threads", 0), ("cores", 0), ("block", -1), ("kind", "gpu"), ("kind", "plain"),
        ("simulated", 1), ("breakdown", (1.0,)), ("breakdown", (math.nan,) * 6), ("breakdown", [0.0] * 6),
        ("at_seconds", math.inf),
    ],
)  # fmt: skip
def test_a_measurement_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match="measurement"):
        replace(measurements()[0], **{name: value})


def test_a_repeat_that_is_there_twice_is_refused() -> None:
    with pytest.raises(InputError, match="Repeat 0 of 1 worker is there twice"):
        Scaling([*measurements(), measured(1, 0, 999.0)], ABOUT)
    with pytest.raises(InputError, match="made of Measurement"):
        Scaling([1.0])  # type: ignore[list-item]


# --- shown


def test_the_table_as_text_has_all_that_matters_and_is_not_wide() -> None:
    text = repr(study())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "strong scaling, batch of 256, AllReduce()"
    four = lines[4].split()
    assert four == ["4", "2,560", "2,080–2,880", "3.20", "3.20–3.20", "2.56", "1.60", "80", "%", "0.083"]
    assert "plain PyTorch, 4 cores: 1,600 samples/s (1,300–1,800)" in text.replace("\n  ", " ")
    assert "4 local processes; a <fast> CPU" in text
    for unsaid in ("more workers than cores", "ncomplete", "imulated", "Not measured"):
        assert unsaid not in text


def test_more_workers_than_cores_are_marked() -> None:
    made = Scaling([replace(m, cores=2) for m in measurements()], replace(ABOUT, cores=2))
    assert made.crowded == (4,)
    assert "4*" in repr(made)
    assert "* more workers than cores (2 cores)" in repr(made)


def test_what_is_simulated_says_so_everywhere() -> None:
    about = replace(ABOUT, pool="far away", simulated=True)
    made = Scaling([replace(m, simulated=True) for m in measurements() if m.kind == "workers"], about)
    assert made.simulated
    for shown in (repr(made), made._repr_html_()):
        assert shown.count("imulated") >= 2
        assert "Not measured" not in shown
    assert made.row(2).simulated
    assert not Scaling(measurements(), replace(ABOUT, pool="simulated? no: a name says nothing")).simulated


def test_what_follows_from_simulated_workers_says_that_it_is_simulated() -> None:
    about = replace(ABOUT, simulated=True)
    found = [replace(m, simulated=True) for m in measurements() if m.kind == "workers"]
    made, real = Scaling(found, about, histories=[history()]), study(histories=[history()])
    for shown in (made.fit("amdahl"), made.compare(), *made.compare().fits.values(), made.costs, made.predict(8)):
        assert shown.simulated
        assert "imulated" in repr(shown)
        assert "imulated" in getattr(shown, "_repr_html_", shown.__str__)()
        assert "imulated" in getattr(shown, "words", "simulated")
    for measured_ in (real.fit("amdahl"), real.compare(), *real.compare().fits.values(), real.costs, real.predict(8)):
        assert not measured_.simulated
        assert "imulated" not in str(measured_).replace("simulated=False", "")


def test_asking_does_not_change_a_study() -> None:
    few = crowded_above(2)
    before = repr(few), few.to_json()
    few.fit("amdahl")
    few.compare()
    few.predict(16)
    assert (repr(few), few.to_json()) == before


def test_errors_of_a_comparison_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def broken(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise InputError("out of order")

    monkeypatch.setattr("parakit.scaling.laws.selection.compare", broken)
    with pytest.raises(InputError, match="out of order"):
        study(histories=[history()]).compare()
    assert calls == [1]  # and it was not tried again without the cost model


def test_a_study_without_steps_for_a_cost_model_is_compared_without_one() -> None:
    assert "mechanistic" in study(histories=[history()]).compare().fits
    assert "mechanistic" not in study().compare().fits


def rivals_of(one: float, all_: float, *, spread: float = 0.0) -> Scaling:
    found = [m for m in measurements() if m.kind == "workers"]
    for block, weather in enumerate(WEATHER):
        luck = 1 + spread * (block - 1)
        found += [plainly(1, block, one * weather * luck), plainly(4, block, all_ * weather * luck)]
    return Scaling(found, ABOUT)


def words(made: Scaling) -> str:
    return " ".join(repr(made).split())


def test_plain_pytorch_that_is_slower_on_all_cores_is_told() -> None:
    slow = rivals_of(1250.0, 1000.0)
    assert "Plain PyTorch is slower with 4 cores than with 1 core: 0.80 times the samples/s." in words(slow)
    assert "slower with 4 cores than with 1 core" in slow._repr_html_()
    assert "slower with 4 cores" not in words(study())


def test_plain_pytorch_that_is_faster_than_any_number_of_workers_is_told() -> None:
    fast = rivals_of(1000.0, 4000.0)
    told = "Plain PyTorch, 4 cores, is faster than every worker count here: 1.25 times 4 workers, the fastest."
    assert told in words(fast)
    assert told in fast._repr_html_()
    unsure = rivals_of(1000.0, 3400.0, spread=0.3)
    assert "faster than every worker count here by the median, though not in every block" in words(unsure)
    assert "faster than every" not in words(study())
    assert "faster than every" not in words(Scaling([plainly(1, 0, 100.0)]))


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e2, 1e4, 1e7])
def test_no_line_of_a_table_is_wider_than_80_columns(scale: float) -> None:
    strategy = "Own(" + ", ".join(f"option_{n}={n}" for n in range(20)) + ")"
    many_ = [1, 2, 4, 1024, 100_000]
    for cores in (4, 192):
        found = [measured(n, block, rate, cores=cores) for block, weather in enumerate(WEATHER) for n in many_
                 for rate in [scale * weather * 1234.5 * n**0.9]]  # fmt: skip
        for block in range(3):
            found += [plainly(1, block, 1250 * scale), plainly(192, block, 98765 * scale)]
        made = Scaling(found, replace(ABOUT, strategy=strategy, machine="A processor with a long name " * 4))
        assert max(map(len, repr(made).splitlines())) <= 80
        # Where the columns do not fit beside each other, none is lost.
        heads = [word for line in repr(made).splitlines() for word in line.split() if word in ("eff.", "K-F")]
        assert heads == ["eff.", "K-F"]


def test_an_incomplete_study_says_so_and_why() -> None:
    half = Scaling(measurements()[:4], ABOUT, stopped="interrupted.", notes=["4 workers could not be measured: full"])
    assert not half.complete
    for shown in (repr(half), half._repr_html_()):
        assert "Incomplete: interrupted." in shown
        assert "4 workers could not be measured: full" in shown
    assert not Scaling(measurements()[:4], ABOUT).complete
    assert study().complete


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scopes: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "th":
            self.scopes.append(str(dict(attrs).get("scope")))


def test_the_table_for_notebooks_is_escaped_and_names_its_rows_and_columns() -> None:
    shown = study()._repr_html_()
    assert "a &lt;fast&gt; CPU" in shown
    assert "<fast>" not in shown
    cells = Cells()
    cells.feed(shown)
    assert cells.scopes == ["col"] * 9 + ["row"] * 3
    assert cells.tags.count("td") == 3 * 8
    assert "caption" in cells.tags


def test_a_study_without_baselines_says_what_is_missing() -> None:
    bare = Scaling([measured(2, 0, 100.0), measured(4, 0, 150.0)])
    assert "Not measured: one worker and plain PyTorch." in repr(bare)
    assert math.isnan(bare.table()[0].speedup.median)
    with pytest.raises(InputError, match=r"1 workers were not measured: this study has 2, 4\."):
        bare.speedup(2)
    with pytest.raises(InputError, match="3 workers were not measured"):
        study().speedup(3)
    assert bare._repr_png_().startswith(b"\x89PNG")


def test_a_study_of_nothing_can_be_shown() -> None:
    empty = Scaling([], stopped="interrupted.")
    assert "Nothing was measured." in repr(empty)
    assert empty._repr_png_().startswith(b"\x89PNG")
    assert len(empty.table()) == 0


def test_a_picture_is_drawn() -> None:
    assert study()._repr_png_().startswith(b"\x89PNG")


# --- kept


def history() -> History:
    kept = History()
    kept.append(RunStart(0.0, "AllReduce()", ("a",), "4 local processes", 4, 1, 650, 5000, 64, 256, 100, 20, 0))
    at = 0.0
    for workers in (1, 2, 4):
        kept.append(Resized(at, 0, workers, ("w",) * workers, 0, 0.1, 0.0, "gloo"))
        for number in range(20):
            at += 0.1 / workers
            share = WorkerStep("w", 0.001, 0.03 / workers, 0.06 / workers, 0.002, 0.001, 0.0, 256 // workers)
            kept.append(StepDone(at, number, 0, 1.0, 256, 0.1 / workers, 0.1, workers, workers, (share,) * workers))
        kept.append(SegmentDone(at, 0, 20, 2.0 / workers, 0.01, 0.0, 5120, workers, workers))
        kept.append(GradientNorms(at, 0, (0.5,) * workers, (256 // workers,) * workers, 0.4))
    return kept


def test_a_study_comes_back_from_json_as_it_was(tmp_path: Path) -> None:
    made = study(histories=[history()], stopped="interrupted.", notes=["a <note>"])
    place = made.save(tmp_path / "study.json")
    for back in (Scaling.from_json(made.to_json()), Scaling.load(place), Scaling.load(str(place))):
        assert back.measurements == made.measurements
        assert back.about == made.about
        assert (back.stopped, back.notes) == (made.stopped, made.notes)
        assert [h.to_dicts() for h in back.histories] == [h.to_dicts() for h in made.histories]
        assert repr(back) == repr(made)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def changed(**more: Any) -> str:
    return json.dumps(study().to_dict() | more)


def with_first(**more: Any) -> str:
    values = study().to_dict()
    values["measurements"][0] |= more
    return json.dumps(values)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", '{"format": "else"}', changed(version=3), changed(measurements=None),
        changed(about={}), changed(about=None), changed(histories=3), changed(measurements=[{}]),
        changed(measurements=[3]), with_first(rate=math.nan), with_first(rate="fast"), with_first(workers=1.5),
        with_first(workers=None), with_first(more=1), with_first(breakdown=["a"] * 6), with_first(breakdown=3),
        changed(histories=[[{"kind": "Nothing"}]]), changed(histories=[3]), changed(histories=[[3]]),
        changed(about=study().to_dict()["about"] | {"mode": "medium"}),
        changed(about=study().to_dict()["about"] | {"counts": [1, "2"]}),
        changed(about=study().to_dict()["about"] | {"batch_size": "256"}),
        None, 3, "[" * 100_000, '{"a":' * 100_000, "1" * 5000, b"\xff", changed(version=True), changed(stopped=None),
        changed(notes=[1]),
    ],
)  # fmt: skip
def test_what_is_no_study_is_refused(text: Any) -> None:
    with pytest.raises(InputError):
        Scaling.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 0), ("threads", 1.5), ("cores", 0), ("batch_size", -256), ("batch_size", 0), ("parameters", -1),
        ("samples", -5), ("repeats", -1), ("seconds", math.nan), ("seconds", -1.0), ("seconds", math.inf),
        ("seconds", 10**400), ("seed", -1), ("counts", [0]), ("counts", [True]), ("counts", 3), ("simulated", 1),
        ("in_turns", None), ("cores", 10**30), ("pool", 3), ("mode", "medium"),
    ],
)  # fmt: skip
def test_what_a_study_is_about_is_checked_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        Scaling.from_json(changed(about=study().to_dict()["about"] | {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("threads", 0), ("cores", 0), ("rate", 10**400), ("rate", -1.0), ("workers", 10**30), ("at_seconds", math.nan),
     ("seconds", None), ("simulated", "no")],
)  # fmt: skip
def test_a_measurement_in_a_file_is_checked_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        Scaling.from_json(with_first(**{name: value}))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("RunStart", "cores", 0), ("RunStart", "threads_per_worker", 0), ("RunStart", "batch_size", -1),
        ("RunStart", "parameters", -1), ("StepDone", "seconds", math.nan), ("StepDone", "seconds", -1.0),
        ("StepDone", "world_size", 0), ("StepDone", "workers", []), ("StepDone", "at_seconds", math.inf),
        ("StepDone", "samples", -1), ("SegmentDone", "control_seconds", math.nan),
    ],
)  # fmt: skip
def test_an_event_in_a_file_is_checked_by_name(kind: str, name: str, value: Any) -> None:
    values = study(histories=[history()]).to_dict()
    next(event for event in values["histories"][0] if event["kind"] == kind)[name] = value
    with pytest.raises(InputError, match=f"{kind}.{name}"):
        Scaling.from_json(json.dumps(values))


def test_the_account_of_a_worker_in_a_file_is_checked() -> None:
    values = study(histories=[history()]).to_dict()
    done = next(event for event in values["histories"][0] if event["kind"] == "StepDone")
    done["workers"][0]["backward_seconds"] = math.nan
    with pytest.raises(InputError, match=r"StepDone\.workers"):
        Scaling.from_json(json.dumps(values))


def test_a_file_of_version_1_is_read() -> None:
    for pool, simulated, in_turns in (
        ("simulated, virtual clock", True, False), ("inline, in this process", False, True), ("Dask", False, False),
    ):  # fmt: skip
        old = study(histories=[history()]).to_dict() | {"version": 1}
        start = next(event for event in old["histories"][0] if event["kind"] == "RunStart")
        del start["exchange"], start["simulated"]
        old["about"] = {k: v for k, v in old["about"].items() if k not in ("simulated", "in_turns")} | {"pool": pool}
        back = Scaling.from_json(json.dumps(old))
        assert (back.about.simulated, back.about.in_turns) == (simulated, in_turns)
        begun = back.histories[0].latest(RunStart)
        assert begun is not None
        assert (begun.simulated, begun.exchange) == (simulated, "in turns" if in_turns else "")


@pytest.mark.parametrize("path", [None, 3, "", "study\0.json", b"study.json", ["study.json"], True])
def test_a_path_that_cannot_be_is_refused(path: Any) -> None:
    with pytest.raises(InputError, match="path is"):
        study().save(path)
    with pytest.raises(InputError, match="path is"):
        Scaling.load(path)


def test_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.json"):
        study().save(tmp_path / "study.csv")
    with pytest.raises(InputError, match="no folder"):
        study().save(tmp_path / "nowhere" / "study.json")
    with pytest.raises(InputError, match="No study can be read"):
        Scaling.load(tmp_path / "nothing.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        study().save(tmp_path / "folder.json")
    with pytest.raises(InputError, match="No study can be read"):
        Scaling.load(tmp_path / "folder.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="No study can be read"):
        Scaling.load(tmp_path / "binary.json")


def test_a_frame_has_a_row_a_measurement() -> None:
    frame = study().to_frame()
    assert len(frame) == 15
    assert frame[frame.kind == "workers"].groupby("workers").rate.median().to_dict() == pytest.approx(
        {1: 800, 2: 1520, 4: 2560}
    )
    assert frame.loc[0, "backward_seconds"] == 0.004
    assert frame[frame.kind == "plain"].backward_seconds.isna().all()
    assert len(Scaling([]).to_frame()) == 0


# --- what follows


def test_a_cost_model_comes_from_the_steps_that_were_timed() -> None:
    costs = study(histories=[history()]).costs
    assert costs.batch_size == 256
    assert costs.sample_seconds == pytest.approx(0.091 / 256, rel=0.1)
    with pytest.raises(InputError, match="no events of steps"):
        _ = study().costs


def test_a_law_needs_two_counts() -> None:
    alone = Scaling([measured(1, 0, 100.0), measured(1, 1, 101.0)])
    for ask in (alone.fit, alone.compare, lambda: alone.predict(4)):
        with pytest.raises(InputError, match="at least two worker counts; only 1 of them"):
            ask()
    with pytest.raises(InputError, match="none can be used"):
        Scaling([]).fit()


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "4", None, math.nan])
def test_a_prediction_is_asked_for_a_number_of_workers(wrong: Any) -> None:
    with pytest.raises(InputError, match="n is"):
        study().predict(wrong)


def crowded_above(cores: int) -> Scaling:
    found = [measured(n, block, 100.0 * n, cores=cores) for block in range(2) for n in (1, 2, 4, 8)]
    return Scaling(found, replace(ABOUT, cores=cores))


def taken_by_fits(study: Scaling, crowded: bool | None) -> tuple[Any, Any]:
    """Worker counts and rates that a fit is made of."""
    taken: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parakit.scaling.laws.fit.fit", lambda law, *given: taken.append(given))
        study.fit(crowded=crowded)
    return taken[0]


def test_crowded_counts_take_part_in_a_fit_only_if_few_others_are_there() -> None:
    enough = crowded_above(4)
    counts, rates = taken_by_fits(enough, None)
    assert counts.tolist() == [1, 2, 4] * 2
    assert rates.tolist() == [100.0, 200.0, 400.0] * 2
    assert "more than there are cores" not in words(enough)
    assert taken_by_fits(enough, True)[0].tolist() == [1, 2, 4, 8] * 2
    few = crowded_above(2)
    assert taken_by_fits(few, None)[0].tolist() == [1, 2, 4, 8] * 2
    assert taken_by_fits(few, None)[1].shape == (8,)
    assert "4, 8 workers too, more than there are cores" in words(few)
    assert taken_by_fits(few, False)[0].tolist() == [1, 2] * 2
    with pytest.raises(InputError, match="more workers than cores are left out"):
        crowded_above(1).fit(crowded=False)
