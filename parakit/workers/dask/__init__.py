"""Workers on Dask: the pool, a run's crew on it, and how members find each other. The only importer of distributed."""
