"""Oracles, twins and helpers that the tests share."""
