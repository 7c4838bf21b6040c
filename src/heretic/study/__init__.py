"""The search: trials asked for, scored, told and kept."""

import warnings

import optuna

# What Optuna tells of every study and trial is told by us.
optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
