"""Scoring: model outputs, verdicts on responses, divergences, and scorers."""
