"""The machine and its processes, and nothing of training."""
