"""What scores cost: CPU seconds per trial of the demonstration model with one, 16 and 32 tokens of the original's answers, and with
whole answers to the harmless prompts, alternating in one process on the same trials.

    uv run python bench/score_cost.py --trials 8 --trials-per-batch 4
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from heretic.config import Settings
from heretic.editing.directions import mean_residual, refusal_directions
from heretic.evaluator import Evaluator
from heretic.loading.load import load_model
from heretic.loading.source import model_source
from heretic.model import Model
from heretic.prompts import load_prompts
from heretic.scoring.measured import measure_original
from heretic.utils import SilentProgress
from trial_speed import random_trials

VARIANTS: dict[str, dict[str, Any]] = {
    "first token": {"kl_tokens": 1},
    "16 tokens": {"kl_tokens": 16},
    "32 tokens": {"kl_tokens": 32},
    "16 tokens, harmless answers": {"kl_tokens": 16, "scorers": {"harmless_refusals": {"finalists_only": False}}},
}


def make_evaluators() -> dict[str, Evaluator]:
    """An evaluator for each variant, over one loaded model."""
    settings = Settings(demo=True)  # type: ignore[call-arg]
    loaded = load_model(settings, model_source(settings), SilentProgress())
    names = ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")
    prompts = {name: load_prompts(getattr(settings, name), settings.system_prompt, name) for name in names}
    good, bad = (mean_residual(Model(loaded, settings).residuals(prompts[name])) for name in names[:2])
    directions = refusal_directions(good, bad)
    evaluators = {}
    for name, changes in VARIANTS.items():
        changed = Settings.model_validate({"demo": True, **changes})
        model = Model(loaded, changed)
        model.use_directions(directions, "none")
        evaluators[name] = Evaluator(changed, model, measure_original(changed, model, prompts[names[2]], prompts[names[3]]))
    return evaluators


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Processor time of the whole process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--trials-per-batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # one thread does not wait for another, whatever else the machine does
    evaluators = make_evaluators()
    trials = random_trials(options.trials, ["attn.o_proj", "mlp.down_proj"], options.seed)
    batches = [trials[i : i + options.trials_per_batch] for i in range(0, len(trials), options.trials_per_batch)]
    seconds = dict.fromkeys(VARIANTS, 0.0)
    for evaluator in evaluators.values():
        evaluator.score_trials(batches[0])  # nobody's first pass is counted
    for _ in range(options.repeats):
        for batch in batches:
            for name, evaluator in evaluators.items():
                seconds[name] += cpu_seconds(lambda e=evaluator, b=batch: e.score_trials(b))  # type: ignore[misc]
    per_trial = {name: round(total / options.repeats / len(trials), 4) for name, total in seconds.items()}
    usual = per_trial["first token"]
    ratios = {name: round(value / usual, 3) for name, value in per_trial.items()}
    print(json.dumps({"trials": len(trials), "trials_per_batch": options.trials_per_batch, "cpu_s": per_trial, "ratio": ratios}))


if __name__ == "__main__":
    main()
