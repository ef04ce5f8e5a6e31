"""Gradients as sums over samples with a count, and the memory that they are added up in."""
