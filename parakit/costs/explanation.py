"""What can be said of a cost model: where the time of a step goes, and which change would help.

Owns words, and the table that a notebook shows. Advice is computed by trying each change in the cost model itself,
never by rule of thumb.
"""

from __future__ import annotations

import html

from parakit.costs.breakdown import TERMS, StepCosts
from parakit.formatting import many

__all__ = ["explain", "gains", "table"]

_WORDS = {
    "compute": "Computing",
    "waiting": "Waiting for the slowest worker",
    "exchange": "Exchange",
    "update": "The update",
    "control": "Control",
}
_SHOWN = (1, 2, 4, 8, 16, 32, 64)
_HELPS = 1.02  # times the throughput; a smaller gain is none


def gains(model: StepCosts, n: int) -> dict[str, float]:
    """What some changes would do at N workers: throughput with each over throughput now, the best first."""
    now = model.throughput(n)
    within = None if model.within is None else model.within.sped_up(2)
    changed = {
        "half the bytes (compression)": model.with_(nbytes=model.nbytes / 2),
        "twice the batch": model.with_(batch_size=2 * model.batch_size),
        "a network twice as fast": model.with_(network=model.network.sped_up(2), within=within),
        "workers that never straggle": model.with_(stragglers=0.0, spread=0.0),
        "cores twice as fast": model.with_(relative_speed=2 * model.relative_speed),
    }
    tried = {what: another.throughput(n) / now for what, another in changed.items()}
    tried["twice as many workers"] = model.throughput(2 * n) / now
    return dict(sorted(tried.items(), key=lambda item: -item[1]))


def explain(model: StepCosts, n: int) -> str:
    """Where the time goes at N workers, and which change would help most, in words."""
    tried = gains(model, n)
    helping = [f"{what} ({gain:.2f} times the samples/s)" for what, gain in tried.items() if gain >= _HELPS]
    useless = [what for what, gain in tried.items() if gain < _HELPS]
    sentences = ["Simulated:"] if model.simulated else []
    sentences.append(_largest_term(model, n))
    if helping:
        rest = f"; then {', '.join(helping[1:])}" if helping[1:] else ""
        sentences.append(f"Most would help: {helping[0]}{rest}.")
    if useless:
        sentences.append(f"No help: {', '.join(useless)}.")
    return " ".join(sentences)


def _largest_term(model: StepCosts, n: int) -> str:
    parts = model.breakdown(n)
    term = max(TERMS, key=parts.share)
    crowding = model.crowding(n)
    crowded = f", with {crowding:.3g} threads to a core" if crowding > 1 else ""
    return (
        f"{_WORDS[term]} is {100 * parts.share(term):.0f} % of a step at {many(n, 'worker')} "
        f"({1e3 * parts.step_seconds:.3g} ms, {model.throughput(n):,.0f} samples/s){crowded}."
    )


def table(model: StepCosts) -> str:
    """The terms at some worker counts, as HTML."""
    head = "".join(f"<th>{name}</th>" for name in ("workers", "step, ms", *TERMS, "samples/s", "speedup"))
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _row(model, n))}</tr>" for n in _SHOWN)
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in model.remarks)
    return (
        f"<p>{html.escape(repr(model)[1:-1])}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        + (f"<ul>{remarks}</ul>" if remarks else "")
    )


def _row(model: StepCosts, n: int) -> list[str]:
    parts = model.breakdown(n)
    shares = [f"{100 * parts.share(term):.0f} %" for term in TERMS]
    step, rate, speedup = 1e3 * parts.step_seconds, model.throughput(n), model.speedup(n)
    return [f"{n}", f"{step:.3g}", *shares, f"{rate:,.0f}", f"{speedup:.2f}"]
