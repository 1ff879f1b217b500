"""Generative models whose forward process is any scale-space."""

__version__ = "0.1.0"
