"""Train a model: `python train.py [process=… data=… experiment=… key=value …]`; see configs/train.yaml.

Hydra's completion recognises a script by the text @hydra.main, which decorates dpm_scales/entry/train.py.
"""

from dpm_scales.entry.start import start

if __name__ == "__main__":
    start("train", "script")
