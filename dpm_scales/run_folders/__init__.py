"""Find the folders of runs, and read their files and states, without torch."""
