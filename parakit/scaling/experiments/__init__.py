"""Experiments that measure scaling: a sweep over worker counts, advice for a machine."""
