"""What `generation` is made of: rows, their keys and values, and what need not be computed again."""
