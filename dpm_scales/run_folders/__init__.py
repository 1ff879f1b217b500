"""Folders of runs, read without torch: their files, their states, and where they lie."""
