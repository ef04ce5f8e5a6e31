"""Exchange through memory that the workers of one host share: faster than any connection between them."""

from parakit.shared_memory import CannotShare
from parakit.workers.shared.exchange import SharedGroup

__all__ = ["CannotShare", "SharedGroup"]
