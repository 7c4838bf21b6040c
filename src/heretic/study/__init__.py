"""The search: trials asked for, scored, told and kept."""
