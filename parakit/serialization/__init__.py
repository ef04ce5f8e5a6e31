"""How a model, and all the code that belongs to it, is copied and travels to other processes."""

from parakit.serialization.frozen import Frozen, TooLarge, freeze
from parakit.serialization.local_code import dumps

__all__ = ["Frozen", "TooLarge", "dumps", "freeze"]
