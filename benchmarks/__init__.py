"""Benchmarks: evaluation of generated images, and timings compared with public implementations."""
