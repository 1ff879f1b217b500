"""Run sweeps: folders named by options, one table of results, a search for the best values."""
