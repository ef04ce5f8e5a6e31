"""Exchange through memory that the workers of one host share: faster than any connection between them."""

from parakit.collectives.shared_memory.group import SharedGroup
from parakit.system.shared_memory import CannotShare

__all__ = ["CannotShare", "SharedGroup"]
