"""What `export` is made of: stored tensors and edits of them, the record, the card, uploads, and rebuilding from a record."""

# Files that lie beside the weights: the record, the directions, the card and its picture.
RECORD, DIRECTIONS, CARD, PICTURE = "heretic.json", "heretic.directions", "README.md", "kernel.svg"
