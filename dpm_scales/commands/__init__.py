"""The commands: what `sample.py`, `evaluate.py` and `evolve.py` run, one function of the config for each task."""
