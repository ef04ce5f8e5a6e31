"""What happened in a run: records, the history that keeps them, and what can be read from it."""
