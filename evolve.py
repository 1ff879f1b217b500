"""Evolve real images: `python evolve.py [task=NAME] [process=NAME] out=DIR key=value …`; see configs/evolve.yaml.

Hydra's completion recognises a script by the text @hydra.main, which decorates dpm_scales/entry/evolve.py.
"""

from dpm_scales.entry.start import start

if __name__ == "__main__":
    start("evolve", "script")
