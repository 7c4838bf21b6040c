"""What a model puts out, and the figures made of it."""
