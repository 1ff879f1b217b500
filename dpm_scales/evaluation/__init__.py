"""Evaluate generated images: references, features of samples, bits per dimension. A library without commands."""
