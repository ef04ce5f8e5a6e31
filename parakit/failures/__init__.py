"""Failures of the user's code in words: where it was raised, in which step and over which rows."""
