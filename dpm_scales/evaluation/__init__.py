"""Evaluate generated images: references, features of samples, bits per dimension. Contains no commands."""
