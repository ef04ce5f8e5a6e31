"""Engines: what trains on one worker, by which it computes, updates and commits. One engine a file."""
