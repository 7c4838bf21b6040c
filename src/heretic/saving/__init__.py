"""Saving and uploading results: stored tensors and their edits, adapters, the record, the model card."""

# Files next to the weights: the record, the directions, the model card and its plot.
RECORD, DIRECTIONS, CARD, PICTURE = "heretic.json", "heretic.directions", "README.md", "kernel.svg"
