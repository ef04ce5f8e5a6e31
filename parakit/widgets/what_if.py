"""`what_if`: sliders over a cost model, which answer at once what other workers, networks and batches would bring."""

from __future__ import annotations

import dataclasses
import math
from html import escape
from typing import Any

import ipywidgets as w

from parakit.costs.model import CostModel, costs_of
from parakit.costs.networks import Network
from parakit.errors import InputError
from parakit.plots.cost_model import what_if_picture
from parakit.widgets.output import Place, hands_free

__all__ = ["WhatIf", "what_if"]

_STYLE = {"description_width": "150px"}
_WIDE = "430px"
_PICTURE_WIDTH = "1000px"
_AS_IT_IS, _WHAT_IF = "as it is", "what if"


def what_if(costs: Any, *, workers: int = 16, most: int = 1024) -> WhatIf:
    """Show what other workers, networks, models and batches would bring, by a cost model.

    Parameters
    ----------
    costs : CostModel, Scaling, Run or History
        What was measured, as `parakit.costs.model.CostModel.from_history` takes it; or a cost model itself.
    workers : int
        How many to begin with.
    most : int
        The most that can be asked for.

    Returns
    -------
    WhatIf
        Shown in the notebook. Nothing in it is measured, and it says so.

    Raises
    ------
    InputError
        If there is no cost model in `costs`, or the numbers of workers cannot be.
    """
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (workers, most)) or not 1 <= workers <= most:
        raise InputError(f"what_if cannot begin with {workers!r} of at most {most!r} workers.")
    shown = WhatIf(_cost_model(costs), workers, most)
    shown.open()
    return shown


def _cost_model(given: Any) -> CostModel:
    found = costs_of(given)
    if found is not None:
        return found
    raise InputError(
        f"{type(given).__name__} is nothing that costs can be told from.",
        remedy="give a study of pk.sweep, a run, its history, or a CostModel",
    )


class WhatIf:
    """Sliders, a picture and words; `model` is what they are set to.

    Parameters
    ----------
    measured : CostModel
    workers, most : int
    """

    def __init__(self, measured: CostModel, workers: int, most: int) -> None:
        self._measured = measured
        self._counts = [1 << place for place in range(most.bit_length()) if 1 << place <= most]
        self._place = Place()
        network = measured.network
        self.workers = w.SelectionSlider(
            options=sorted({*self._counts, workers, most}), value=workers, **_look("workers")
        )
        self.bandwidth = _factor("bandwidth, Gbit/s", 8e-9 * network.bytes_per_second)
        self.latency = _factor("latency, µs", 1e6 * network.latency_seconds or 1.0)
        self.size = _factor("gradient, MB", measured.nbytes / 1e6 or 1.0)
        self.batch = _factor("batch, samples", float(measured.batch_size))
        self.stragglers = w.FloatSlider(min=0.0, max=0.2, step=0.005, value=measured.stragglers, readout_format=".1%",
                                        **_look("stragglers"))  # fmt: skip
        self.reset = w.Button(description="As it is", tooltip="back to what was measured")
        self.picture = w.Image(format="png", layout=w.Layout(width="100%", max_width=_PICTURE_WIDTH, margin="0"))
        self.words = w.HTML(layout=w.Layout(max_width=_PICTURE_WIDTH, margin="0"))
        self._sliders = (self.workers, self.bandwidth, self.latency, self.size, self.batch, self.stragglers)
        self._begun = [slider.value for slider in self._sliders]
        columns = [w.VBox(self._sliders[:3]), w.VBox(self._sliders[3:])]
        self.box = w.VBox(
            [w.HBox(columns, layout=w.Layout(flex_flow="row wrap")), self.reset, self.picture, self.words]
        )
        for slider in self._sliders:
            slider.observe(lambda _: self.draw(), "value")
        self.reset.on_click(lambda _: self._set_back())
        self.draw()

    @property
    def model(self) -> CostModel:
        """The cost model that the sliders are set to."""
        bandwidth, latency, size, batch, stragglers = map(self._said, self._sliders[1:], self._begun[1:])
        if [bandwidth, latency, size, batch, stragglers] == self._begun[1:]:
            return self._measured
        network = self._measured.network
        if [bandwidth, latency] != self._begun[1:3]:
            network = Network("another network", 1e-6 * latency, bandwidth / 8e-9, "what if")
        return dataclasses.replace(
            self._measured, network=network, nbytes=1e6 * size,
            batch_size=max(1, round(batch)), stragglers=float(stragglers),
        )  # fmt: skip

    @staticmethod
    def _said(slider: Any, begun: float) -> float:
        """What a slider is set to: as it was, if it is as near to that as a browser can set it."""
        value = float(slider.value)
        off = math.log10(value / begun) if isinstance(slider, w.FloatLogSlider) else value - begun
        return begun if abs(off) < slider.step else value

    def open(self) -> None:
        """Show it in the notebook: a plain picture where nobody can move a slider."""
        if hands_free():
            self.close()
        else:
            self._place.show(self.box)

    def close(self) -> None:
        """Leave a plain picture and text in its place."""
        self._place.settle(bytes(self.picture.value), self.text)

    def draw(self) -> None:
        """Show what the sliders say."""
        changed = self.model
        models = {_AS_IT_IS: self._measured}
        if changed is not self._measured:
            models[_WHAT_IF] = changed
        self.picture.value = what_if_picture(models, self._counts, self.workers.value)
        self.words.value = "".join(f"<p>{escape(line)}</p>" for line in self.text.splitlines())

    @property
    def text(self) -> str:
        """What the picture says, in words."""
        n, changed = self.workers.value, self.model
        lines = [f"Simulated, not measured: {changed!r}".replace("<", "").replace(">", ""), changed.explain(n)]
        if changed is not self._measured:
            times = changed.throughput(n) / self._measured.throughput(n)
            lines.append(f"That is {times:.2f} times the samples/s of {n:,} workers as it is.")
        return "\n".join(lines)

    def _set_back(self) -> None:
        for slider, value in zip(self._sliders, self._begun, strict=True):
            slider.value = value

    def __repr__(self) -> str:
        return f"<WhatIf (simulated): {self.workers.value:,} workers, {self.model!r}>"


def _look(name: str) -> dict[str, Any]:
    return {"description": name, "style": _STYLE, "layout": w.Layout(width=_WIDE), "continuous_update": True}


def _factor(name: str, value: float) -> w.FloatLogSlider:
    """A slider from a hundredth to a hundred times a value."""
    middle = round(math.log10(value), 2)
    return w.FloatLogSlider(value=value, base=10, min=middle - 2, max=middle + 2, step=0.05, readout_format=",.3r",
                            **_look(name))  # fmt: skip
