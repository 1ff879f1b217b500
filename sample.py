"""Sample or edit images: `python sample.py model=RUN_EXPORT_OR_CKPT [task=NAME] out=DIR`; see configs/sample.yaml.

Hydra's completion recognises a script by the text @hydra.main, which decorates dpm_scales/entry/sample.py.
"""

from dpm_scales.entry.start import start

if __name__ == "__main__":
    start("sample", "script")
