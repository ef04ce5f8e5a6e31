"""Losses as sums over samples: in which form a loss adds up, and what of it a share computes."""
