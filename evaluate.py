"""Compare images with real ones: `python evaluate.py model=… | samples=DIR reference=…`; see configs/evaluate.yaml.

Hydra's completion recognises a script by the text @hydra.main, which decorates dpm_scales/entry/evaluate.py.
"""

from dpm_scales.entry.start import start

if __name__ == "__main__":
    start("evaluate", "script")
