"""The control room: a live panel over a run, in a notebook.

`controls` owns the widgets, `report` the words and the table, `place` the panel's place in the notebook, `steering` the
worker count, `draft` a run that has not begun, `panel` the life of a panel, `opening` the way in. `what_if` has sliders
over a cost model instead of a run.
"""

from parakit.widgets.api import panel
from parakit.widgets.panel import Panel
from parakit.widgets.what_if import WhatIf, what_if

__all__ = ["Panel", "WhatIf", "panel", "what_if"]
