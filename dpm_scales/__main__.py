"""`python -m dpm_scales COMMAND …` is `dpm-scales COMMAND …`."""

from __future__ import annotations

from dpm_scales.entry.start import dispatch

if __name__ == "__main__":
    dispatch("module")
