"""Greedy decoding of many rows at once: rows, their keys and values, and the prefix cache."""
