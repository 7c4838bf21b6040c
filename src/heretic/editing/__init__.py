"""Edits: their algebra, the modules they apply to, and how they are applied to a loaded model."""
