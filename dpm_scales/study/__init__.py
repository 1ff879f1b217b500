"""Measure processes side by side on real images. A library without commands."""
