"""The control room: a live panel over a run, in a notebook.

`controls` owns the widgets, `report` the words and the table, `place` the panel's place in the notebook, `steering` the
worker count, `draft` a run that has not begun, `panel` the life of a panel, `opening` the way in.
"""

from parakit.control_room.opening import panel
from parakit.control_room.panel import Panel

__all__ = ["Panel", "panel"]
