"""What more workers are worth: the rivals that a run is measured against.

A speedup names its baseline. Here are the baselines, and how they are timed.
"""
