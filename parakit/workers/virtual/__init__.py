"""Virtual workers: real arithmetic or none, a virtual clock, and prices by a cost model."""
