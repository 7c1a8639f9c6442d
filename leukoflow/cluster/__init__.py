"""The Dask workers of a run: how they are started, watched and described."""
