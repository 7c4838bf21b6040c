"""The report of a study, and pictures of residuals."""
