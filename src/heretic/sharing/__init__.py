"""A study that several workers share, on one machine or several."""
