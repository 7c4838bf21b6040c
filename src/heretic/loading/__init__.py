"""Loading models, from a name to a loaded model."""
