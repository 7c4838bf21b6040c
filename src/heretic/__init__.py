"""Directional ablation of transformer language models, searched automatically."""

__version__ = "0.1.0"
