"""The control room: a live panel over a run, in a notebook.

`api` is the way in; `settings` has a run that has not begun; `panel` the life of a panel, `life` its stages, `live` the
run under it, `watcher` its thread, `callbacks` what its widgets call. `controls` owns the widgets, `screen` what they
show, `report` the words and the table, `log` the panel's own sentences, `output` the place in the notebook. `tour` has
the worker count, `baseline_schedule` when plain PyTorch is timed. `what_if` has sliders over a cost model instead of a
run.
"""

from parakit.widgets.api import panel
from parakit.widgets.panel import Panel
from parakit.widgets.what_if import WhatIf, what_if

__all__ = ["Panel", "WhatIf", "panel", "what_if"]
