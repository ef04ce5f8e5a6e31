"""Exchange through memory that the workers of one host share: faster than any connection between them."""

from parakit.collectives.shared_memory.group import SharedMemoryGroup
from parakit.system.shared_memory import CannotShare

__all__ = ["CannotShare", "SharedMemoryGroup"]
