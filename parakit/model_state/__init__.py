"""What a model has beside its parameters, and how it stays the same on all workers: buffers, attributes, hooks."""
