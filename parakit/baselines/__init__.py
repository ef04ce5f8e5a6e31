"""Plain PyTorch, timed on the same model and rows: what speedups are measured against."""
