"""The parts of a run that talk to the user."""
