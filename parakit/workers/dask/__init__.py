"""Workers on Dask: the pool, a run's session on it, the store of a group. Nothing else imports distributed."""
