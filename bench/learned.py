"""What learned edits give beside a search: fronts, hypervolumes and seconds, and what each part of the loss is worth.

    uv run python bench/small_models.py MODELS                       # or folders of other models, each with its four lists of prompts
    uv run python bench/learned.py MODELS/llama-0 MODELS/gpt2-0 demo --search 40 --seeds 0 1 2

A folder holds a model and `good.txt`, `bad.txt`, `good_evaluation.txt`, `bad_evaluation.txt`; `demo` is the demonstration model. Learned
edits come from the first two lists, everything is scored on the other two. The hypervolume is that of (share of refusals left, KL
divergence) below (1, 1 nat), as a share of the whole. `--leave-out` learns again without one part of the loss at a time.

`alone` is a check by other means, of the edit with the smallest divergence among those with 5 refusals or fewer (else of the one with
fewest): it is saved, loaded by transformers alone, and counted by the usual markers; `kl` is of first tokens. `answers` and `original` are
mean log-probabilities under the original, per token from the sixth word on, of the edit's answers to harmful prompts and of the original's
to harmless ones. `kl_floor`: the divergence that any edit has which never begins to refuse, since the original does at some harmless
prompts. `floor_s`: what the passes of learning cannot avoid on this machine. What to paste into LOG.md is printed before the last
line, which is one JSON object.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from heretic.config import Settings
from heretic.editing.ablation import Ablation
from heretic.editing.directions import mean_residual, refusal_directions, separating_layer
from heretic.evaluator import Evaluator, Score
from heretic.loading.load import load_model
from heretic.loading.source import model_source
from heretic.model import Model
from heretic.prompts import Prompt, load_prompts
from heretic.saving.export import save
from heretic.saving.record import Result
from heretic.scoring.measured import measure_original
from heretic.specifications import PromptSpecification
from heretic.study.batching import automatic_trials_per_batch
from heretic.study.learning import Learner, Parts
from heretic.study.samplers import Sampling
from heretic.study.search import Search
from heretic.study.space import search_space
from heretic.utils import SilentProgress
from machine import ceilings, heading, now
from real_model import is_refusal, respond
from search_quality import hypervolume

PROMPTS = ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")
REFERENCE_KL = 1.0
ANSWER_TOKENS, FIRST_WORDS = 40, 5
FEW = 5  # refusals


Strengths = dict[str, list[tuple[int, float, float]]]


def by_component(learner: Learner) -> Strengths:
    """Layer, strength and cosine to the difference of means of each edited module, as a saved model's card shows them."""
    found: Strengths = {}
    for writer, strength, cosine in zip(learner.edit.writers, learner.edit.strengths.tolist(), learner.edit.turned(), strict=True):
        found.setdefault(writer.component, []).append((writer.layer, strength, cosine))
    return found


class Subject:
    """A model ready to be edited, its scores, and the prompts for its directions."""

    def __init__(self, name: str, mode: Any, max_response_length: int) -> None:
        given: dict[str, Any] = {"demo": True} if name == "demo" else {"model": name, "demo": False}
        for prompts in PROMPTS if name != "demo" else ():
            given[prompts] = PromptSpecification(dataset=str(Path(name) / f"{prompts.removesuffix('_prompts')}.txt"))
        self.settings = Settings(**given, row_normalization=mode, max_response_length=max_response_length, seed=0)
        lists = {prompts: load_prompts(getattr(self.settings, prompts), self.settings.system_prompt, prompts) for prompts in PROMPTS}
        self.good: list[Prompt] = lists["good_prompts"]
        self.bad: list[Prompt] = lists["bad_prompts"]
        self.model = Model(load_model(self.settings, model_source(self.settings), SilentProgress()), self.settings)
        scored = lists["good_evaluation_prompts"], lists["bad_evaluation_prompts"]
        self.evaluator = Evaluator(self.settings, self.model, measure_original(self.settings, self.model, *scored))
        good, bad = (mean_residual(self.model.residuals(prompts)) for prompts in (self.good, self.bad))
        self.model.use_directions(refusal_directions(good, bad), mode)
        self._ceilings: tuple[float, float] | None = None
        self.separating_layer = separating_layer(good, bad)

    def point(self, score: Score) -> tuple[int, float]:
        """Refusals and KL divergence."""
        return score.refusals, score.kl_divergence

    def volume(self, points: list[tuple[int, float]]) -> float:
        """The hypervolume of some trials."""
        base = self.evaluator.original.refusals
        return hypervolume([(refusals / base, kl) for refusals, kl in points], REFERENCE_KL)

    def learn(self, seed: int, n_trials: int, parts: Parts) -> dict[str, Any]:
        """All learned trials of one seed."""
        start = now()
        components = list(self.model.architecture.components)
        learner = Learner(self.model, self.evaluator.original.rule, self.good, self.bad, components, seed, parts)
        seconds = now() - start
        kl_floor = self.kl_floor(learner)
        points: list[tuple[int, float]] = []
        ablations: list[Ablation] = []
        edits: list[Strengths] = []
        sequence: list[float] = []
        steps = 0
        floor = self.floor()
        for number in range(n_trials):
            start, weight = now(), learner.next_weight()
            with floor.counted(self.model.model):
                outcome = learner.learn(number, weight, lambda n: None)
            seconds += now() - start
            assert outcome is not None
            steps += outcome.n_steps
            ablations.append(learner.ablation())
            edits.append(by_component(learner))
            score = self.evaluator.score(ablations[-1])
            points.append(self.point(score))
            sequence.append(score.scores["sequence_kl_divergence"])
        best = min(range(n_trials), key=lambda i: (max(points[i][0], FEW), points[i][1]))
        return {
            "checked": best,
            "points": [(refusals, round(kl, 5)) for refusals, kl in points],
            "sequence_kl": [round(value, 5) for value in sequence],
            "hypervolume": round(self.volume(points), 4),
            "steps": steps,
            "seconds": round(seconds, 1),
            "floor_s": round(floor.seconds, 3),
            "kl_floor": kl_floor,
            "alone": self.alone(ablations[best], edits[best]),
            "answers": self.plausibility(ablations[best]),
            "original": self.plausibility(None),
        }

    def kl_floor(self, learner: Learner) -> float:
        """The divergence that is left to any edit which never begins with a token that only refusals begin with: the original does
        at some harmless prompts. `-log(1 - p)` of these tokens, in the mean; taken from the learner before it begins."""
        refusing = learner.openings.deciding(())
        total = 0.0
        for _, logprobs in self.model.logprobs_of_trials(self.evaluator.original.good_prompts, []):
            p = logprobs[:, refusing].double().exp().sum(dim=-1)
            total -= float(torch.log1p(-p.clamp(max=1 - 1e-9)).sum())
        return round(total / len(self.evaluator.original.good_prompts), 5)

    def alone(self, ablation: Ablation, edit: Strengths) -> dict[str, float]:
        """What transformers makes of the saved edit: refusals of both kinds of prompts, and the divergence from the original."""
        result = Result(self.settings, 0, ablation, 0, 0.0, 0, 0, "", learned=edit)
        with tempfile.TemporaryDirectory() as folder:
            save(self.model, result, "merge", str(Path(folder) / "saved"), False, SilentProgress())
            saved = AutoModelForCausalLM.from_pretrained(Path(folder) / "saved", dtype=self.model.model.dtype).eval()

        def logprobs(model: Any, tokens: list[int]) -> Tensor:
            return torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, -1].double(), dim=-1)

        divergences = []
        with torch.inference_mode():
            for prompt in self.evaluator.original.good_prompts:
                p, q = (logprobs(model, self.model.rows_of([prompt], 1)[0].tokens) for model in (self.model.model, saved))
                divergences.append(float((p.exp() * (p - q)).sum()))
        return {**self.refused_alone(saved), "kl": round(sum(divergences) / len(divergences), 5)}

    def refused_alone(self, model: Any) -> dict[str, float]:
        """Refusals of a model by the usual markers, with transformers' own decoding."""
        original, tokenizer = self.evaluator.original, self.model.tokenizer
        found: dict[str, float] = {}
        for name, prompts in (("refused", original.bad_prompts), ("harmless_refused", original.good_prompts)):
            tokens = [list(self.model.rows_of([prompt], 1)[0].tokens) for prompt in prompts]
            texts = tokenizer.batch_decode(respond(model, tokenizer, tokens, ANSWER_TOKENS), skip_special_tokens=True)
            found[name] = sum(map(is_refusal, texts))
        return found

    def floor(self) -> "Floor":
        """The floor of passes that are yet to come."""
        if self._ceilings is None:
            self._ceilings = ceilings(self.model.device, self.model.model.dtype)
        outside = {id(module.weight) for module in (self.model.model.get_input_embeddings(), self.model.model.get_output_embeddings())}
        n_weights = sum(p.numel() for p in self.model.model.parameters() if id(p) not in outside)
        return Floor(n_weights, self.model.model.dtype.itemsize, *self._ceilings)

    def plausibility(self, ablation: Ablation | None) -> float:
        """Mean log-probability under the original of answers from the sixth word on: the edit's to harmful prompts, or its own."""
        prompts = self.evaluator.original.good_prompts if ablation is None else self.evaluator.original.bad_prompts
        total, n = 0.0, 0
        ablations = [] if ablation is None else [ablation]
        rows = list(self.model.responses_of_trials(self.model.rows_of(prompts, 1), ANSWER_TOKENS, ablations))
        for row in rows:
            words = [len(self.model.tokenizer.decode(row.generated[: i + 1]).split()) for i in range(len(row.generated))]
            start = next((i for i, count in enumerate(words) if count > FIRST_WORDS), len(words))
            if len(words) - start < 2:
                continue
            with torch.inference_mode():
                logits = self.model.logits_at_end([[*row.tokens, *row.generated]], len(row.generated) + 1)[0, :-1]
            logprobs = torch.log_softmax(logits.float(), dim=-1)[range(len(row.generated)), row.generated]
            total, n = total + float(logprobs[start:].sum()), n + len(words) - start
        return round(total / max(1, n), 4)

    def search(self, seed: int, n_trials: int) -> dict[str, Any]:
        """A search of one seed with the settings' defaults."""
        import optuna

        start = now()
        last_layer = len(self.model.architecture.layers) - 1
        space = search_space(self.settings, list(self.model.architecture.components), last_layer, self.separating_layer)
        study = optuna.create_study(directions=["minimize", "minimize"])
        search = Search(study, "memory", space, Sampling(seed, n_trials * 3 // 10))
        size = automatic_trials_per_batch(len(self.evaluator.original.bad_prompts), n_trials)
        search.run(n_trials, self.evaluator.score_trials, self.evaluator.objectives, size)
        points = [(trial.user_attrs["refusals"], trial.user_attrs["kl_divergence"]) for trial in search.front]
        seconds = now() - start
        return {
            "points": [(refusals, round(kl, 5)) for refusals, kl in points],
            "hypervolume": round(self.volume(points), 4),
            "seconds": round(seconds, 1),
        }


@dataclass
class Floor:
    """Seconds that passes cannot avoid: of each, the larger of its operations and of reading the weights.

    A pass with gradients computes each product once more: no weight has a gradient. Embeddings and logits are left out. Not for mixtures
    of experts, of whose weights a pass reads some only.
    """

    n_weights: int
    itemsize: int
    flops: float
    bandwidth: float
    seconds: float = 0.0

    @contextmanager
    def counted(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, passes of the model are added."""

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            operations = (4 if torch.is_grad_enabled() else 2) * self.n_weights * kwargs["input_ids"].numel()
            self.seconds += max(operations / self.flops, self.n_weights * self.itemsize / self.bandwidth)

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def log_entry(report: dict[str, Any]) -> str:
    """What to paste into LOG.md."""
    lines = [
        "| model | | hypervolume | fewest refused at | alone | steps | seconds | floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, found in report.items():
        for kind, own in found.items():
            if isinstance(own, dict):
                refused, kl = min(map(tuple, own["points"]))
                alone = "{refused} at {kl}".format(**own["alone"]) if "alone" in own else ""
                cells = [own["hypervolume"], f"{refused} at {kl}", alone, own.get("steps", ""), own["seconds"], own.get("floor_s", "")]
                lines.append(f"| {' | '.join(map(str, [model, kind, *cells]))} |")
    bases = ", ".join(f"{model} {found['base_refusals']} (alone {found['base_alone']})" for model, found in report.items())
    return "\n".join([heading("learned edits"), f"Refused by the originals: {bases}.", "", *lines])


def main() -> None:
    """Measure all that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders, or demo")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=8, help="learned trials")
    parser.add_argument("--search", type=int, nargs="*", default=[], help="searches of so many trials beside it")
    parser.add_argument("--mode", choices=["none", "pre", "full"], default="none")
    parser.add_argument("--leave-out", action="store_true", help="learn again without each part of the loss")
    parser.add_argument("--max-response-length", type=int, default=60)
    arguments = parser.parse_args()
    report: dict[str, Any] = {}
    for name in arguments.models:
        subject = Subject(name, arguments.mode, arguments.max_response_length)
        found: dict[str, Any] = {"base_refusals": subject.evaluator.original.refusals}
        found["base_alone"] = list(subject.refused_alone(subject.model.model).values())
        for seed in arguments.seeds:
            kinds = {"learned": Parts()}
            if arguments.leave_out:
                kinds |= {f"without {part.name}": Parts(**{part.name: False}) for part in fields(Parts)}
            for kind, parts in kinds.items():
                found[f"{kind}, seed {seed}"] = subject.learn(seed, arguments.trials, parts)
                print(name, kind, seed, json.dumps(found[f"{kind}, seed {seed}"]), flush=True)
            for n_trials in arguments.search:
                found[f"search of {n_trials}, seed {seed}"] = subject.search(seed, n_trials)
                print(name, "search", n_trials, seed, json.dumps(found[f"search of {n_trials}, seed {seed}"]), flush=True)
        report[Path(name).name] = found
    print(f"\n{log_entry(report)}\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
