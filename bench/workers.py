"""Does a second worker double the trials? Trials per minute of the demonstration study with 1 and 2 workers of one thread each.

    uv run python bench/workers.py                  # one JSON line at the end
    uv run python bench/workers.py --workers 1 2 4  # on a machine with as many cores

Counted from the first trial that is done to the last, so that loading is left out. The machine should be idle: each worker needs a core of
its own. Startup trials only, which every run draws alike; dominated trials run to the end, since when they stop depends on the order.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState


def one_run(n_workers: int, n_trials: int, folder: Path) -> dict[str, Any]:
    """A whole run; trials per minute, and what they left in the journal."""
    command = [sys.executable, "-m", "heretic", "--demo", "--seed", "1", "--workers", str(n_workers), "--study-checkpoint-dir", str(folder)]
    options = ["--n-trials", str(n_trials), "--n-startup-trials", str(n_trials), "--trials-per-batch", "1", "--no-stop-dominated-trials"]
    # The workers divide these threads.
    threads = {"OMP_NUM_THREADS": str(n_workers), "MKL_NUM_THREADS": str(n_workers)}
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, env={**os.environ, **threads}, cwd=folder)
    journal = folder / "heretic-demo.jsonl"
    trials = optuna.load_study(study_name="heretic", storage=JournalStorage(JournalFileBackend(str(journal)))).trials
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    ends = sorted(trial.datetime_complete for trial in complete if trial.datetime_complete is not None)
    # From when every worker is at work: the first end of each.
    start = max(min(t.datetime_complete for t in complete if t.system_attrs["worker"] == name) for name in _workers(complete))
    n_after = sum(end > start for end in ends)
    seconds = (ends[-1] - start).total_seconds()
    return {
        "workers": n_workers,
        "trials_per_minute": round(60 * n_after / seconds, 1),
        "at_work": len(_workers(complete)),
        "journal_bytes_per_trial": round(journal.stat().st_size / len(complete)),
        "journal_lines_per_trial": round(len(journal.read_bytes().splitlines()) / len(complete), 1),
    }


def _workers(trials: list[Any]) -> set[str]:
    return {trial.system_attrs["worker"] for trial in trials}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trials", type=int, default=120)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runs = []
    for n_workers in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(one_run(n_workers, options.trials, Path(folder)))
        print(json.dumps(runs[-1]), flush=True)
    ratio = runs[-1]["trials_per_minute"] / runs[0]["trials_per_minute"]
    print(json.dumps({"runs": runs, "ratio": round(ratio, 2), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
