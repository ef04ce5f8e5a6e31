"""Exchange through memory that the workers of one host share: faster than any connection between them."""

from parakit.workers.shared.exchange import SharedGroup
from parakit.workers.shared.segments import CannotShare

__all__ = ["CannotShare", "SharedGroup"]
