"""What `export` is made of: stored tensors and edits of them, the record, the card, uploads, and rebuilding from a record."""
