"""Saving and uploading results: stored tensors and their edits, adapters, the record, the model card."""
