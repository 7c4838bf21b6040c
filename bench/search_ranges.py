"""Which search ranges, and which first trials, find the better front? Hypervolumes over small models of different depth.

Every run is a whole search from one seed; all variants of a seed begin with the same random numbers. Scores are those of the evaluator on
40 + 40 evaluation prompts, with responses of at most 8 tokens (these models refuse with their first word).

    uv run python bench/small_models.py MODELS
    uv run python bench/search_ranges.py MODELS --output runs.jsonl          # one line for each run, as they come
    uv run python bench/search_ranges.py --summary runs.jsonl

The hypervolume is that of (share of refusals left, KL divergence) below (1, R), as a share of the whole rectangle, for each of several
R, since the divergence at which a model is damaged differs from model to model. The last line is one JSON object: for every model and
variant, after 40 and after 100 trials, the mean over the seeds, and mean and standard error of the difference from another variant
(`--base`), seed by seed, and over how many seeds.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch

from heretic.config import SamplerName, Settings
from heretic.editing.directions import mean_residual, refusal_directions, separating_layer
from heretic.evaluator import Evaluator
from heretic.loading.load import load_model
from heretic.loading.source import model_source
from heretic.model import Model
from heretic.prompts import load_prompts
from heretic.scoring.measured import measure_original
from heretic.specifications import PromptSpecification
from heretic.study.front import pareto_front
from heretic.study.samplers import Sampling
from heretic.study.search import Search
from heretic.study.space import search_space
from heretic.utils import SilentProgress
from search_quality import hypervolume

N_TRIALS = (40, 100)
N_STARTUP = 15
TRIALS_PER_BATCH = 4
REFERENCE_KL = (0.02, 0.1, 0.5)
PROMPTS = ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")
DEMO = "demo"


@dataclass(frozen=True)
class Subject:
    """A model ready to be searched, and the layer in which harmless and harmful prompts separate."""

    name: str
    evaluator: Evaluator
    separating_layer: int

    @property
    def last_layer(self) -> int:
        """Index of the last layer."""
        return len(self.evaluator.model.architecture.layers) - 1


def subject(folder: Path | None) -> Subject:
    """The model in a folder with its prompts; None: the demonstration model."""
    settings: dict[str, Any] = {"demo": True} if folder is None else {"model": str(folder), "demo": False}
    for name in PROMPTS if folder is not None else ():
        size = 40 if "evaluation" in name else 200
        settings[name] = PromptSpecification(dataset=str(folder / f"{name.removesuffix('_prompts')}.txt"), split=f"[:{size}]")
    checked = Settings(**settings, max_response_length=8)
    model = Model(load_model(checked, model_source(checked), SilentProgress()), checked)
    prompts = {name: load_prompts(getattr(checked, name), checked.system_prompt, name) for name in PROMPTS}
    good, bad = (mean_residual(model.residuals(prompts[name])) for name in PROMPTS[:2])
    model.use_directions(refusal_directions(good, bad), "none")
    evaluator = Evaluator(checked, model, measure_original(checked, model, prompts[PROMPTS[2]][:40], prompts[PROMPTS[3]][:40]))
    return Subject(DEMO if folder is None else folder.name, evaluator, separating_layer(good, bad))


def ranged(low: float, high: float) -> dict[str, float]:
    """A range of the settings."""
    return {"low": low, "high": high}


def flat(index: float | None) -> dict[str, Any]:
    """A first trial: strength 1 over all layers, along one direction or (None) each layer's own."""
    where = {"direction_scope": "per layer"} if index is None else {"direction_scope": "global", "direction_index": round(index, 2)}
    return {**where, "max_weight": 1.0, "max_weight_position": 0.6, "min_weight": 1.0, "min_weight_distance": 0.6}


def first_trials(s: Subject) -> list[dict[str, Any]]:
    """Each layer's own direction, and single ones from a bit above the layer in which the prompts part."""
    start = s.separating_layer / s.last_layer
    return [flat(None), *(flat(start + share * (0.9 - start)) for share in (0.33, 0.67))]


def whole(strength: Any, position: float, distance: float) -> dict[str, Any]:
    """Ranges of the settings, the same for all models."""
    positions = {"max_weight_position": ranged(position, 1), "min_weight_distance": ranged(0, distance)}
    return {"parameters": {"direction_index": ranged(0.4, 0.9), "max_weight": strength, **positions}}


NARROW = {"attn.o_proj": ranged(0.8, 1.5), "mlp.down_proj": ranged(0, 1.5), "mlp.experts.down_proj": ranged(0, 1.5)}


def narrow(s: Subject) -> dict[str, Any]:
    """Of the components that the model has."""
    return whole({name: own for name, own in NARROW.items() if name in s.evaluator.model.architecture.components}, 0.6, 0.6)


# Settings of each variant; the program's default begins in narrow ranges.
VARIANTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "narrow": narrow,
    "wide": lambda s: whole(ranged(0, 3), 0.3, 1),
    "narrow first": lambda s: {},
    "narrow first, first trials": lambda s: {"first_trials": first_trials(s)},
}


def one_run(s: Subject, variant: str, seed: int, sampler: SamplerName = "tpe") -> dict[str, Any]:
    """A search, and what its front was after so many trials."""
    settings = Settings.model_validate({"demo": True, **VARIANTS[variant](s)})
    space = search_space(settings, list(s.evaluator.model.architecture.components), s.last_layer, s.separating_layer)
    study = optuna.create_study(directions=["minimize", "minimize"])
    search = Search(study, Path("memory"), space, Sampling(seed, N_STARTUP, sampler, settings.first_trials))
    start = time.process_time()
    fronts = {}
    for n_trials in N_TRIALS:
        search.run(n_trials, s.evaluator.score_trials, s.evaluator.objectives, TRIALS_PER_BATCH)
        base = s.evaluator.original.refusals
        front = [(t.user_attrs["refusals"] / base, t.user_attrs["kl_divergence"]) for t in pareto_front(search.trials)]
        fronts[str(n_trials)] = front
    cost = round(time.process_time() - start, 1)
    return {"model": s.name, "variant": variant, "sampler": sampler, "seed": seed, "fronts": fronts, "cpu_s": cost}


def summary(runs: Sequence[dict[str, Any]], base_variant: str) -> dict[str, Any]:
    """Per model, variant, sampler, number of trials and R: mean; mean, standard error and number of the differences from a variant."""
    volumes: dict[tuple[str, str, int, float], dict[int, float]] = {}
    for run in runs:
        label = run["variant"] if run["sampler"] == "tpe" else f"{run['variant']}, {run['sampler']}"
        for n in N_TRIALS:
            for reference in REFERENCE_KL:
                key = (run["model"], label, n, reference)
                volumes.setdefault(key, {})[run["seed"]] = hypervolume([tuple(p) for p in run["fronts"][str(n)]], reference)
    result: dict[str, Any] = {}
    for (model, label, n, reference), own in volumes.items():
        base = volumes.get((model, base_variant, n, reference), {})
        differences = [own[seed] - base[seed] for seed in own if seed in base]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        figures = [statistics.fmean(own.values()), statistics.fmean(differences) if differences else math.nan, error, len(differences)]
        result.setdefault(model, {}).setdefault(f"{n} trials, R = {reference}", {})[label] = [round(x, 3) for x in figures]
    return result


def main() -> None:
    """Measure, or sum up what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="?", help="folder from bench/small_models.py")
    parser.add_argument("--only", nargs="*", help="models")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--samplers", nargs="*", default=["tpe"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file that gets a line for each run")
    parser.add_argument("--summary", type=Path, nargs="+", help="only sum up these files")
    parser.add_argument("--base", default="narrow", choices=list(VARIANTS), help="variant that the others are compared with")
    options = parser.parse_args()
    if options.summary:
        runs = [json.loads(line) for path in options.summary for line in path.read_text().splitlines()]
        print(json.dumps(summary(runs, options.base)))
        return
    torch.set_num_threads(1)
    folders = [None, *sorted(p for p in options.models.iterdir() if p.is_dir())]
    for folder in folders:
        name = DEMO if folder is None else folder.name
        if options.only and name not in options.only:
            continue
        s = subject(folder)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for variant in options.variants:
                for sampler in options.samplers:
                    run = one_run(s, variant, seed, sampler)
                    print(json.dumps(run), flush=True)
                    if options.output:
                        with options.output.open("a") as file:
                            file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
