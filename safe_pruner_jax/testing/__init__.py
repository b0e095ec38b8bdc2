"""Comparison with stored numbers."""
