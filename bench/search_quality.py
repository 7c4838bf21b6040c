"""Do shared passes, stopped dominated trials or many workers cost the search anything? Hypervolume of the front on the demonstration model.

Every run is a whole search from one seed. The settings of one seed follow each other, so that whatever number of seeds is done is a
complete comparison. A trial's score is a function of its parameters, so one that was computed to the end before (startup trials are
the same in all runs of a seed) is looked up; a trial that is stopped is computed.

    uv run python bench/search_quality.py --seeds 10 --output quality.jsonl     # one line for each run, as they come
    uv run python bench/search_quality.py --summary quality.jsonl
    uv run python bench/search_quality.py --workers --output workers.jsonl      # 1, 4 and 16 workers on one study

Workers are simulated: so many trials are always running, each takes 0.7 to 1.3 units of time, and the one that ends first is told before
its worker asks for another. What is asked and told is what workers do (`SharedSearch`), on a study in memory.

The hypervolume is that of (share of refusals left, KL divergence) below (1, 0.02), as a share of the whole rectangle. The last line is
one JSON object: mean and standard deviation over seeds for every setting.
"""

import argparse
import heapq
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import InMemoryStorage
from optuna.trial import Trial

from heretic.config import Settings
from heretic.editing.ablation import Ablation
from heretic.editing.directions import mean_residual, refusal_directions
from heretic.errors import TrialError
from heretic.evaluator import Evaluator, Score
from heretic.loading.load import load_model
from heretic.loading.source import model_source
from heretic.model import Model
from heretic.prompts import load_prompts
from heretic.scoring.measured import measure_original
from heretic.sharing.shared_search import SharedSearch
from heretic.sharing.storage import SharedStorage
from heretic.study.front import pareto_front, refusal_limit
from heretic.study.samplers import Sampling
from heretic.study.search import Search
from heretic.study.space import search_space
from heretic.utils import SilentProgress

# Trials per batch, and whether dominated trials are stopped.
RUNS = [(1, True), (4, True), (8, True), (16, True), (4, False)]
N_TRIALS = (50, 100)
WORKERS = [1, 4, 16]
DURATION = (0.7, 1.3)
REFERENCE_KL = 0.02


def hypervolume(points: Sequence[tuple[float, float]], reference: float = REFERENCE_KL) -> float:
    """The share of the rectangle below (1, `reference`) that points (refusals left, divergence) dominate."""
    area, lowest = 0.0, reference
    for refusals, kl in sorted(points):
        if refusals < 1 and kl < lowest:
            area += (1 - refusals) * (lowest - kl)
            lowest = kl
    return area / reference


class Scores:
    """The evaluator, and what it has said before."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.known: dict[str, Score] = {}
        self.n_computed = 0

    def __call__(self, ablations: Sequence[Ablation], limit: Callable[[float], float]) -> list[Score | TrialError]:
        results: dict[str, Score | TrialError] = {}
        for ablation in ablations:
            score = self.known.get(repr(ablation))
            if score is not None and score.refusals <= limit(score.kl_divergence):
                results[repr(ablation)] = score
        rest = [ablation for ablation in ablations if repr(ablation) not in results]
        if rest:
            self.n_computed += len(rest)
            for ablation, result in zip(rest, self.evaluator.score_trials(rest, limit), strict=True):
                results[repr(ablation)] = result
                if isinstance(result, Score) and not result.bounded:
                    self.known[repr(ablation)] = result
        return [results[repr(ablation)] for ablation in ablations]


def demo_evaluator() -> tuple[Settings, Evaluator]:
    """The demonstration model, ready to be searched."""
    settings = Settings(demo=True)  # type: ignore[call-arg]
    model = Model(load_model(settings, model_source(settings), SilentProgress()), settings)
    names = ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")
    prompts = {name: load_prompts(getattr(settings, name), settings.system_prompt, name) for name in names}
    good, bad = (mean_residual(model.residuals(prompts[name]), settings.winsorization_quantile) for name in names[:2])
    model.use_directions(refusal_directions(good, bad, settings.orthogonalize_direction), settings.row_normalization)
    return settings, Evaluator(
        settings, model, measure_original(settings, model, prompts["good_evaluation_prompts"], prompts["bad_evaluation_prompts"])
    )


def one_run(scores: Scores, settings: Settings, seed: int, trials_per_batch: int, stops: bool) -> dict[str, Any]:
    """A search, and what its front was after so many trials."""
    evaluator = scores.evaluator
    architecture = evaluator.model.architecture
    study = optuna.create_study(directions=["minimize", "minimize"])
    last_layer = len(architecture.layers) - 1
    space = search_space(settings, list(architecture.components), last_layer)
    search = Search(study, Path("memory"), space, Sampling(seed, settings.n_startup_trials))
    start, before = time.process_time(), scores.n_computed
    volumes = {}
    for n_trials in N_TRIALS:
        search.run(n_trials, scores, evaluator.objectives, trials_per_batch, stops)
        base = evaluator.original.refusals
        front = [(t.user_attrs["refusals"] / base, t.user_attrs["kl_divergence"]) for t in pareto_front(search.trials)]
        volumes[f"after_{n_trials}"] = hypervolume(front)
    n_bounded = sum(trial.user_attrs.get("bounded", False) for trial in search.trials)
    cost = {"computed": scores.n_computed - before, "bounded": n_bounded, "cpu_s": round(time.process_time() - start, 1)}
    setting = {"trials_per_batch": trials_per_batch, "stop_dominated": stops}
    return {"seed": seed, **setting, **volumes, **cost}


def run_of_workers(scores: Scores, settings: Settings, seed: int, n_workers: int) -> dict[str, Any]:
    """A search by so many simulated workers, and what its front was after so many trials."""
    evaluator = scores.evaluator
    architecture = evaluator.model.architecture
    storage = SharedStorage(InMemoryStorage(), "memory", 300)  # type: ignore[no-untyped-call]
    study = optuna.create_study(storage=storage, directions=["minimize", "minimize"])
    space = search_space(settings, list(architecture.components), len(architecture.layers) - 1)
    search = SharedSearch(study, storage, space, Sampling(seed, settings.n_startup_trials))
    clock = random.Random(seed)
    start, before = time.process_time(), scores.n_computed
    running: list[tuple[float, int, Trial, Ablation]] = []
    now, volumes = 0.0, {}
    while search.n_done < N_TRIALS[-1]:
        while len(running) < n_workers and (asked := search._ask_some(1, N_TRIALS[-1])):
            ((trial, ablation),) = asked
            heapq.heappush(running, (now + clock.uniform(*DURATION), trial.number, trial, ablation))
        now, _, trial, ablation = heapq.heappop(running)
        (result,) = scores([ablation], refusal_limit(search.trials))
        search._tell(trial, result, 0.0, evaluator.objectives)
        if search.n_done in N_TRIALS:
            front = [(t.user_attrs["refusals"] / evaluator.original.refusals, t.user_attrs["kl_divergence"]) for t in search.front]
            volumes[f"after_{search.n_done}"] = hypervolume(front)
    cost = {"computed": scores.n_computed - before, "time": round(now, 1), "cpu_s": round(time.process_time() - start, 1)}
    return {"seed": seed, "workers": n_workers, **volumes, **cost}


def summary_of_workers(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation for every number of workers, and of its differences from one worker with the same seed."""
    seeds = [seed for seed in {run["seed"] for run in runs} if sum(run["seed"] == seed for run in runs) == len(WORKERS)]
    of = {(run["seed"], run["workers"]): run for run in runs}
    result: dict[str, Any] = {"seeds": len(seeds)}
    for n_workers in WORKERS:
        for key in (f"after_{n}" for n in N_TRIALS):
            values = [of[seed, n_workers][key] for seed in seeds]
            differences = [of[seed, n_workers][key] - of[seed, WORKERS[0]][key] for seed in seeds]
            result[f"{n_workers} workers, {key}"] = [_mean_and_spread(values), _mean_and_spread(differences)]
    return result


def _mean_and_spread(values: Sequence[float]) -> list[float]:
    return [round(statistics.fmean(values), 4), round(statistics.stdev(values) if len(values) > 1 else 0.0, 4)] if values else []


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds for which every setting was run."""
    if any("workers" in run for run in runs):
        return summary_of_workers(runs)
    by_seed: dict[int, int] = {}
    for run in runs:
        by_seed[run["seed"]] = by_seed.get(run["seed"], 0) + 1
    complete = {seed for seed, n in by_seed.items() if n == len(RUNS)}
    result: dict[str, Any] = {"seeds": len(complete)}
    for trials_per_batch, stops in RUNS:
        setting = (trials_per_batch, stops)
        own = [r for r in runs if r["seed"] in complete and (r["trials_per_batch"], r["stop_dominated"]) == setting]
        for key in (f"after_{n}" for n in N_TRIALS):
            values = [run[key] for run in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            name = f"{trials_per_batch} per batch, {'stopping' if stops else 'to the end'}, {key}"
            result[name] = [round(statistics.fmean(values), 4) if values else None, round(spread, 4)]
    return result


def main() -> None:
    """Measure, or sum up what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", action="store_true", help="1, 4 and 16 simulated workers, instead of trials per batch")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--output", type=Path, help="file that gets a line for each run")
    parser.add_argument("--summary", type=Path, help="only sum up this file")
    options = parser.parse_args()
    if options.summary:
        print(json.dumps(summary([json.loads(line) for line in options.summary.read_text().splitlines()])))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    settings, evaluator = demo_evaluator()
    runs = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        scores = Scores(evaluator)
        for setting in WORKERS if options.workers else RUNS:
            run = run_of_workers(scores, settings, seed, setting) if isinstance(setting, int) else one_run(scores, settings, seed, *setting)
            runs.append(run)
            print(json.dumps(runs[-1]), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    print(json.dumps(summary(runs)))


if __name__ == "__main__":
    main()
