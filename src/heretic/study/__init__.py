"""The study: proposing, scoring and storing trials, and the Pareto front."""

import warnings

import optuna

# Progress of studies and trials is reported by heretic itself.
optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
