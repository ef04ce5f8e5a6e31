"""Runs: what is planned, what happens next, and what a user sees of it."""
