"""Measurements: how fast, how far from the limit, and what the compiler made of a kernel."""
