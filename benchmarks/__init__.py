"""Figures about the project: judges of generated images, and timings beside public peers."""
