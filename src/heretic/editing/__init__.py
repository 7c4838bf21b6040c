"""What an edit is, where it applies, and how it is applied to a loaded model."""
