"""What sharing a study costs: operations, bytes and seconds of a trial in the journal file, and how they grow with the number of trials.

    uv run python bench/storage.py                     # a journal in a temporary folder; one JSON line at the end
    uv run python bench/storage.py --url postgresql://user@host/database

Scores are made up, so nothing but storage and sampler is measured: two components, as most models have. CPU seconds if the machine
is shared; wall-clock seconds of an operation include its write to the disk.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from heretic.config import Settings
from heretic.editing.ablation import Ablation
from heretic.evaluator import Score
from heretic.scoring.scorers import divergence_objective
from heretic.sharing.shared_search import SharedSearch
from heretic.sharing.storage import SharedStorage, open_storage
from heretic.study.samplers import Sampling
from heretic.study.space import search_space

COMPONENTS = ["attn.o_proj", "mlp.down_proj"]


def objectives(score: Score) -> tuple[float, float]:
    """What a search is told of a score."""
    share = score.refusals / 100
    return share, divergence_objective(score.kl_divergence, share, 1.0, 0.01)


def score(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
    """Made up: refusals fall and the divergence rises with the weights."""
    strengths = [sum(p.max_weight + p.min_weight - p.max_weight_position for p in a.parameters.values()) for a in ablations]
    return [
        Score(max(0, round(100 - 30 * s)), 0.02 * s**2 + (a.direction_index or 0.2) / 10) for s, a in zip(strengths, ablations, strict=True)
    ]


class Watched(SharedStorage):  # type: ignore[misc]
    """Counts what is asked of the storage, and how long that takes."""

    n_operations = 0
    seconds = 0.0

    def with_retries(self, operation: Callable[[], Any]) -> Any:
        self.n_operations += 1
        start = time.perf_counter()
        try:
            return super().with_retries(operation)
        finally:
            self.seconds += time.perf_counter() - start


def main() -> None:
    """Run a study of made-up trials, and look at every hundred of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        url = options.url or str(Path(folder) / "journal.jsonl")
        opened = open_storage(url, 300)
        storage = Watched(opened.backend, opened.location, 300)
        study = optuna.create_study(storage=storage, study_name="bench", directions=["minimize", "minimize"])
        search = SharedSearch(study, storage, search_space(Settings(model="m"), COMPONENTS, 31), Sampling(1, 60))
        rows = []
        for n in range(options.every, options.trials + 1, options.every):
            before = storage.n_operations, storage.seconds, time.process_time(), _size(url)
            search.run(
                n,
                score,
                objectives,
            )
            rows.append(
                {
                    "trials": n,
                    "operations": round((storage.n_operations - before[0]) / options.every, 1),
                    "storage_ms": round(1000 * (storage.seconds - before[1]) / options.every, 1),
                    "cpu_ms": round(1000 * (time.process_time() - before[2]) / options.every, 1),
                    "bytes": round((_size(url) - before[3]) / options.every),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        start = time.process_time()
        n_read = len(optuna.load_study(study_name="bench", storage=open_storage(url, 300)).trials)
        joining = time.process_time() - start
    result = {
        "storage": opened.location if options.url else "journal",
        "per_trial": rows,
        "mean_operation_ms": round(statistics.fmean(row["storage_ms"] / row["operations"] for row in rows), 2),
        "joining_cpu_s": round(joining, 2),
        "read": n_read,
    }
    print(json.dumps(result))


def _size(url: str) -> int:
    path = Path(url)
    return path.stat().st_size if "://" not in url else 0


if __name__ == "__main__":
    main()
