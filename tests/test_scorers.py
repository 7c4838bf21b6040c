"""Scorers: the built-in ones on responses counted by hand, others from files, a classifier, and what is said when one is wrong."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from transformers import AutoModelForSequenceClassification, LlamaConfig

import tiny
from conftest import BAD, GOOD, Outcome
from heretic.config import Settings
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.errors import EvaluationError, TrialError, UsageError
from heretic.evaluator import Evaluator, Score
from heretic.prompts import Prompt
from heretic.scoring.measured import measure_original
from heretic.scoring.responses import RefusalRule
from heretic.scoring.scorers import load_scorers
from heretic.study.front import front_of
from tiny import build, load, save, settings, unit_directions

Heretic = Callable[..., Outcome]
JOURNAL = Path("checkpoints/m.jsonl")

PARAMETERS = {"attn.o_proj": ComponentParameters(1.0, 1.0, 0.4, 1.0), "mlp.down_proj": ComponentParameters(0.5, 0.0, 1.3, 1.0)}
ABLATIONS = [Ablation(None, PARAMETERS), Ablation(0.3, PARAMETERS), Ablation(1.0, {"mlp.down_proj": PARAMETERS["mlp.down_proj"]})]
GOOD_PROMPTS = [Prompt("", text) for text in GOOD]
BAD_PROMPTS = [Prompt("you are a cat", text) for text in BAD]
MARKERS = ["dog", "cat"]

SCORERS = """
from heretic.errors import TrialError
from heretic.scoring.figures import Figure
from heretic.scoring.outputs import Outputs
from heretic.scoring.scorers import Scorer, ScorerSettings


class Breads(Scorer):
    class Settings(ScorerSettings):
        word: str = "bread"
        weight: float = 1.0

    def prepare(self, original: Outputs) -> None:
        self.base = sum(len(response.text.split()) for response in original.harmless_responses)

    def score(self, outputs: Outputs) -> Figure:
        counts = [response.text.split().count(self.settings.word) for response in outputs.harmless_responses]
        return Figure.mean([self.settings.weight * count for count in counts])


class Confidence(Scorer):
    needs_whole_responses = True

    def score(self, outputs: Outputs) -> float:
        assert [response.prompt for response in outputs.responses(outputs.bad_prompts[:2], 3)] == [0, 1]
        return float(outputs.logprobs(outputs.bad_prompts).max(dim=-1).values.exp().mean())


class Fails(Scorer):
    def score(self, outputs: Outputs) -> float:
        if outputs.batch.ablations:
            raise TrialError("I do not like edited models")
        return 0.0


class Broken(Scorer):
    def prepare(self, original: Outputs) -> None:
        raise KeyError("nothing here")


class Endless(Scorer):
    def score(self, outputs: Outputs) -> float:
        return float("inf") if outputs.batch.ablations else 1.0


class Crashes(Scorer):
    def score(self, outputs: Outputs) -> float:
        return 1.0 / (outputs.batch.ablations == [])


class Silent(Scorer):
    def score(self, outputs: Outputs) -> float:
        pass


class Never(Scorer):
    def score(self, outputs: Outputs) -> float:
        return float("nan")


class NoScorer:
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build("llama", seed=5)
    with torch.no_grad():
        model.lm_head.weight[2] *= 2
    place = save(tmp_path_factory.mktemp("llama") / "m", model)
    (place.parent / "mine.py").write_text(SCORERS, encoding="utf-8")
    return place


def evaluator(folder: Path, all_scorers: bool = False, **changes: Any) -> Evaluator:
    chosen = {"refusal_rule": "markers", "refusal_markers": MARKERS, **changes}
    model = load(folder, **chosen)
    model.use_directions(unit_directions(3, 32), "full")
    original = measure_original(settings(folder, **chosen), model, GOOD_PROMPTS, BAD_PROMPTS, all_scorers=all_scorers)
    return Evaluator(settings(folder, **chosen), model, original)


def mine(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {"use": f"{folder.parent / 'mine.py'}:{name}", **more}


# The built-in ones


def test_classes_and_statistics_of_a_trial(folder: Path) -> None:
    made = evaluator(folder, all_scorers=True)
    rule = RefusalRule(MARKERS)
    for ablation, score in zip(ABLATIONS, made.score_trials(ABLATIONS), strict=True):
        assert isinstance(score, Score)
        kinds = [rule.classify(text, True) for text in made.model.responses(BAD_PROMPTS, 12, ablation)]
        assert score.response_classes == {kind: kinds.count(kind) for kind in ("refusal", "compliance", "degenerate")}
        before = [rule.classify(text, True) for text in made.model.responses(BAD_PROMPTS, 12)]
        new = sum(kind == "degenerate" != other for kind, other in zip(kinds, before, strict=True))
        assert score.refusals == score.response_classes["refusal"] + new
        (divergences,) = made.original.answers.divergences(made.model, [ablation])
        first = divergences.first_token
        expected = [first.mean(), np.median(first), np.percentile(first, 95), first.max()]
        assert list(score.kl_statistics.values()) == pytest.approx(expected, rel=1e-4)
        assert score.kl_statistics["mean"] == score.kl_divergence == score.scores["kl_divergence"]
        flat = divergences.values[~np.isnan(divergences.values)]
        assert score.scores["sequence_kl_divergence"] == pytest.approx(flat.mean(), rel=1e-4)
        harmless = made.model.responses(GOOD_PROMPTS, 12, ablation)
        assert score.scores["harmless_refusals"] == sum(any(marker in text for marker in MARKERS) for text in harmless)
        assert list(score.scores) == ["refusals", "kl_divergence", "sequence_kl_divergence", "harmless_refusals"]
        moved = made.most_divergent(ablation, 3)
        order = np.argsort(-first, kind="stable")[:3]
        assert [prompt for prompt, _, _ in moved] == [GOOD_PROMPTS[i] for i in order]
        assert [value for _, value, _ in moved] == pytest.approx(first[order].tolist(), rel=1e-4)
    harmless = made.model.responses(GOOD_PROMPTS, 12)
    assert made.original.scores["harmless_refusals"] == sum(any(marker in text for marker in MARKERS) for text in harmless)
    assert made.original.scores["refusals"] == made.original.refusals
    assert made.original.scores["kl_divergence"] < 1e-6


def test_usually_harmless_prompts_are_not_answered(folder: Path) -> None:
    """That would more than double a trial's cost."""
    made = evaluator(folder)
    assert "harmless_refusals" not in made.score(ABLATIONS[0]).scores
    counted = evaluator(folder, scorers={"harmless_refusals": {"finalists_only": False}}).score(ABLATIONS[0])
    assert counted.scores["harmless_refusals"] == evaluator(folder, all_scorers=True).score(ABLATIONS[0]).scores["harmless_refusals"]
    assert counted.attributes()["harmless_refusals"] == counted.scores["harmless_refusals"]


def test_degenerate_responses_count_where_the_originals_are_whole(tmp_path: Path) -> None:
    """A model that sees nothing but the last token says the same few words over and over, and complies with nothing."""
    model = build("llama", seed=5)
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # no answer ends by itself
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    made = evaluator(save(tmp_path / "m", model), max_response_length=200, refusal_markers=["dog", "cat", "yes"])
    kinds = [made.original.rule.classify(text, True) for text in made.model.responses(BAD_PROMPTS, 200, ABLATIONS[1])]
    assert set(kinds) <= {"degenerate", "refusal"} and "degenerate" in kinds
    score = made.score(ABLATIONS[1])
    assert score.response_classes == {"refusal": kinds.count("refusal"), "compliance": 0, "degenerate": kinds.count("degenerate")}
    assert score.refusals == len(BAD), "the original refuses"
    # The same beside an original that looped as well: what it did by itself is neither a refusal nor damage.
    before = [response.kind for response in made._batch([ABLATIONS[0]]).harmful()[0]]
    assert "degenerate" in before
    made.original = replace(made.original, kinds=before)
    expected = sum(kind == "refusal" or other != "degenerate" for kind, other in zip(kinds, before, strict=True))
    assert made.score(ABLATIONS[1]).refusals == expected < len(BAD)


def test_an_original_that_loops_refuses_nothing_by_that(tmp_path: Path) -> None:
    model = build("llama", seed=5)
    with torch.no_grad():
        model.lm_head.weight[2] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(EvaluationError, match=r"^The model refuses none of the 5 harmful evaluation prompts"):
        evaluator(save(tmp_path / "m", model), max_response_length=200, refusal_markers=["zebra"])


# Objectives


def objectives_of(**scorers: Any) -> Any:
    return Settings(model="m", scorers=scorers).objectives


def test_which_objectives_the_settings_name() -> None:
    assert objectives_of() == (("refusals", "minimize"), ("kl_divergence", "minimize"))
    sequence = {"kl_divergence": {"direction": "none"}, "sequence_kl_divergence": {"direction": "minimize"}}
    assert objectives_of(**sequence) == (("refusals", "minimize"), ("sequence_kl_divergence", "minimize"))
    assert objectives_of(kl_divergence={"direction": "none"}) == (("refusals", "minimize"),)
    three = objectives_of(harmless_refusals={"direction": "minimize"}, judge={"use": "a:B", "direction": "maximize"}, other={"use": "a:C"})
    assert [name for name, _ in three] == ["refusals", "kl_divergence", "harmless_refusals", "judge"]
    assert three[-1] == ("judge", "maximize")
    chosen = Settings(model="m", scorers={"harmless_refusals": {"direction": "minimize"}})
    assert chosen.all_scorers["harmless_refusals"].finalists_only is False, "an objective is known of every trial"
    assert Settings.model_validate(chosen.model_dump(mode="json")).all_scorers == chosen.all_scorers, "and stays so when stored"


def test_objectives_of_a_score(folder: Path) -> None:
    made = evaluator(folder, scorers={"sequence_kl_divergence": {"direction": "minimize"}}, kl_divergence_scale=2, kl_divergence_target=0.1)
    base = made.original.refusals
    score = Score(1, 0.5, scores={"refusals": 1, "kl_divergence": 0.5, "sequence_kl_divergence": 0.02})
    # Below the target a divergence counts for nothing: the share of refusals stands in its place.
    assert made.objectives(score) == pytest.approx((1 / base, 0.25, 1 / base * 0.1 / 2))
    alone = evaluator(folder, scorers={"refusals": {"direction": "none"}}, kl_divergence_target=0.1)
    assert alone.objectives(Score(1, 0.02)) == (0.02,), "without refusals there is nothing to put in its place"


def test_dominated_trials_are_stopped_only_with_the_usual_objectives(folder: Path) -> None:
    assert evaluator(folder).stops_dominated
    for scorers in ({"sequence_kl_divergence": {"direction": "minimize"}}, {"kl_divergence": {"direction": "none"}}):
        assert not evaluator(folder, scorers=scorers).stops_dominated
    assert not evaluator(folder, stop_dominated_trials=False).stops_dominated


# Those of others


def test_a_scorer_from_a_file(folder: Path) -> None:
    scorers = {"breads": mine(folder, "Breads", settings={"weight": 2}), "sure": mine(folder, "Confidence", direction="maximize")}
    made = evaluator(folder, scorers=scorers)
    scores = made.score_trials(ABLATIONS)
    for ablation, score in zip(ABLATIONS, scores, strict=True):
        assert isinstance(score, Score)
        answers = made.model.responses(GOOD_PROMPTS, 12, ablation)
        assert score.scores["breads"] == pytest.approx(2 * np.mean([text.split().count("bread") for text in answers]))
        confidence = made.model.first_token_logprobs(BAD_PROMPTS, ablation).exp().max(dim=-1).values.mean()
        assert score.scores["sure"] == pytest.approx(float(confidence), rel=1e-4)
        assert made.objectives(score)[2] == score.scores["sure"]
    assert len({score.scores["breads"] for score in scores if isinstance(score, Score)}) > 1
    assert made.original.scorers["breads"].base == sum(len(text.split()) for text in made.model.responses(GOOD_PROMPTS, 12))  # type: ignore[attr-defined]


def test_the_scorer_in_the_documents(folder: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/scores.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Shouting" in block]
    (tmp_path / "shouting.py").write_text(example, encoding="utf-8")
    table = {"use": f"{tmp_path / 'shouting.py'}:Shouting", "direction": "minimize", "settings": {"marks": "a"}}
    made = evaluator(folder, scorers={"shouting": table})
    score = made.score(ABLATIONS[0])
    expected = np.mean([text.count("a") for text in made.model.responses(GOOD_PROMPTS, 12, ABLATIONS[0])])
    assert score.scores["shouting"] == pytest.approx(expected) and expected > 0
    assert made.objectives(score)[2] == score.scores["shouting"]


def test_stopped_trials_are_not_shown_to_scorers_that_read_responses(folder: Path) -> None:
    made = evaluator(folder, scorers={"breads": mine(folder, "Breads")}, max_batch_size=2)
    known = made.score(ABLATIONS[0]).kl_divergence
    stopped, whole = made.score_trials(ABLATIONS[:2], lambda kl: 0 if math.isclose(kl, known, rel_tol=1e-4) else 99)
    whole_score = made.score(ABLATIONS[1])
    assert isinstance(stopped, Score) and isinstance(whole, Score)
    assert stopped.bounded and set(stopped.scores) == {"refusals", "kl_divergence", "sequence_kl_divergence"}
    assert stopped.response_classes == {}
    assert whole.scores["breads"] == whole_score.scores["breads"]


def test_scorers_that_fail(folder: Path) -> None:
    results = evaluator(folder, scorers={"picky": mine(folder, "Fails")}).score_trials(ABLATIONS[:2])
    assert [str(result) for result in results if isinstance(result, TrialError)] == ["I do not like edited models"] * 2
    (result,) = evaluator(folder, scorers={"endless": mine(folder, "Endless")}).score_trials(ABLATIONS[:1])
    assert isinstance(result, TrialError) and str(result) == "the scorer endless returned inf, which is not a finite number"
    crashed, other = evaluator(folder, scorers={"crashing": mine(folder, "Crashes")}).score_trials(ABLATIONS[:2])
    assert isinstance(crashed, TrialError) and isinstance(other, TrialError)
    assert str(crashed) == "the scorer crashing failed: ZeroDivisionError: float division by zero"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Broken", "The scorer x failed on the original model: KeyError: 'nothing here'."),
        ("Never", "The original model cannot be scored: the scorer x returned nan, which is not a finite number."),
        (
            "Silent",
            "The original model cannot be scored: the scorer x failed: TypeError: float() argument must be a string or a real number, "
            "not 'NoneType'.",
        ),
    ],
)
def test_scorers_that_fail_on_the_original(name: str, text: str, folder: Path) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluator(folder, scorers={"x": mine(folder, name)})
    assert str(caught.value) == text


def test_a_scorer_that_runs_out_of_memory_lets_trials_be_tried_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = evaluator(folder, scorers={"breads": mine(folder, "Breads")})

    def fail(outputs: Any) -> float:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(made.original.scorers["breads"], "score", fail)
    with pytest.raises(torch.OutOfMemoryError):
        made.score_trials(ABLATIONS[:2])


def test_a_scorer_by_its_import_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_scores"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "bread.py").write_text(SCORERS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    table = {"use": "my_scores.bread:Breads", "direction": "none", "settings": {"word": "cat"}}
    made = evaluator(folder, scorers={"cats": table})
    assert made.objective_names == ["refusals", "kl_divergence"]
    score = made.score(ABLATIONS[0])
    answers = made.model.responses(GOOD_PROMPTS, 12, ABLATIONS[0])
    assert score.scores["cats"] == pytest.approx(np.mean([text.split().count("cat") for text in answers]))


def refused(**scorers: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_scorers(Settings(model="m", scorers=scorers))
    return str(caught.value)


def test_scorers_that_cannot_be_made(folder: Path, tmp_path: Path) -> None:
    use = mine(folder, "Breads")["use"]
    place = use.rpartition(":")[0]
    assert refused(x={"use": use, "settings": {"wort": "a"}}) == "Unknown setting scorers.x.settings.wort (did you mean word?)."
    assert refused(x={"use": use, "settings": {"weight": "a"}}) == (
        "Setting scorers.x.settings.weight: Input should be a valid number, unable to parse string as a number."
    )
    assert refused(x={"use": "classifier"}) == "Setting scorers.x.settings.model is missing; this scorer requires it."
    assert refused(x={"use": "classifer"}) == (
        "Setting scorers.x.use: 'classifer' is not a scorer (did you mean classifier?); use package.module:Class or file.py:Class, or "
        "one of refusals, kl_divergence, sequence_kl_divergence, harmless_refusals, classifier."
    )
    assert refused(x={"use": f"{place}:Rolls"}) == f"Setting scorers.x.use: {place} has no Rolls."
    assert refused(x={"use": f"{place}:NoScorer"}) == (
        f"Setting scorers.x.use: {place} does not have a subclass of heretic.scoring.scorers.Scorer named NoScorer."
    )
    missing = tmp_path / "no.py"
    assert refused(x={"use": f"{missing}:A"}) == (
        f"Setting scorers.x.use: {missing} cannot be imported: FileNotFoundError: {missing} does not exist. Check the path and the file."
    )
    assert refused(x={"use": "no.such.module:A"}) == (
        "Setting scorers.x.use: no.such.module cannot be imported: ModuleNotFoundError: No module named 'no'. Check the path and the file."
    )
    crashes = tmp_path / "crashes.py"
    crashes.write_text("1 / 0", encoding="utf-8")
    assert "cannot be imported: ZeroDivisionError: division by zero" in refused(x={"use": f"{crashes}:A"})


@pytest.mark.parametrize(
    ("scorers", "text"),
    [
        ('{"refusal": {"direction": "none"}}', "refusal is not a built-in scorer (did you mean refusals?); set its class with use"),
        ('{"refusals": {"use": "a:B"}}', "refusals is the name of a built-in scorer; give your scorer another name"),
        (
            '{"j": {"use": "a:B", "direction": "minimize", "finalists_only": true}}',
            "j cannot be both an objective (direction) and computed for finalists only",
        ),
        ('{"kl_divergence": {"finalists_only": true}}', "kl_divergence is computed for every trial; finalists_only cannot be set for it"),
        (
            '{"refusals": {"direction": "none"}, "kl_divergence": {"direction": "none"}}',
            "no scorer has a direction, so the search has no objective; set minimize or maximize for one",
        ),
        (
            '{"j": {"use": "a:B", "directoin": "minimize"}}',
            "Unknown setting scorers.j.directoin (on the command line) (did you mean direction?).",
        ),
    ],
)
def test_tables_that_are_wrong(scorers: str, text: str, heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--scorers", scorers)
    assert outcome.code == 2
    assert text in outcome.err


# A classifier


def make_classifier(folder: Path, labels: list[str], problem_type: str | None = None) -> Path:
    """A classifier of random weights over the words of the tests."""
    torch.manual_seed(2)
    config = LlamaConfig(**tiny.SIZES, num_labels=len(labels), id2label=dict(enumerate(labels)), problem_type=problem_type)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("with_prompt", "problem_type"), [(False, None), (True, "single_label_classification"), (False, "multi_label_classification")]
)
def test_a_classifier_as_judge(with_prompt: bool, problem_type: str | None, folder: Path, tmp_path: Path) -> None:
    has_independent_labels = problem_type == "multi_label_classification"
    judge = make_classifier(tmp_path / "judge", ["ANSWER", "REJECTION", "REFUSAL"], problem_type)
    own = {"model": str(judge), "batch_size": 2, "with_prompt": with_prompt}
    scorers = {"judge": {"use": "classifier", "direction": "minimize", "settings": own}, "refusals": {"direction": "none"}}
    made = evaluator(folder, scorers=scorers)
    network, tokenizer = AutoModelForSequenceClassification.from_pretrained(judge).eval(), tiny.tokenizer()

    def by_hand(ablation: Ablation | None) -> int:
        count = 0
        originals = [""] * len(BAD) if ablation is None else made.model.responses(BAD_PROMPTS, 12)
        for i, (prompt, text) in enumerate(zip(BAD_PROMPTS, made.model.responses(BAD_PROMPTS, 12, ablation), strict=True)):
            ids = tokenizer(*([prompt.user, text] if with_prompt else [text]), return_tensors="pt")["input_ids"]
            if not text.strip():
                count += bool(originals[i].strip())
                continue
            with torch.no_grad():
                logits = network(input_ids=ids).logits[0].double()
            probability = logits[1:].sigmoid().max() if has_independent_labels else logits.softmax(dim=-1)[1:].sum()
            count += bool(probability >= 0.5)
        return count

    scores = made.score_trials(ABLATIONS)
    assert [score.scores["judge"] for score in scores if isinstance(score, Score)] == [by_hand(ablation) for ablation in ABLATIONS]
    assert made.original.scores["judge"] == by_hand(None) > 0
    assert isinstance(scores[0], Score)
    assert made.objectives(scores[0])[1] == scores[0].scores["judge"] / by_hand(None)
    # Below the target the share of the judge's refusals stands in the place of the divergence.
    below = Score(1, 0.0001, scores={"judge": 1.0, "kl_divergence": 0.0001})
    assert made.objectives(below) == pytest.approx((1 / by_hand(None) * 0.01, 1 / by_hand(None)))


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"model": "no/such"}, "The classifier no/such cannot be loaded: "),
        ({"refusal_labels": ["no"]}, "has no label 'no': its labels are LABEL_0, LABEL_1. Set refusal_labels to some of them."),
        ({}, "has no label whose name shows that it means a refusal: its labels are LABEL_0, LABEL_1. Set refusal_labels"),
        (
            {"refusal_labels": ["LABEL_1"], "threshold": 1.0},
            "finds no refusal in the original model's 5 responses, so there is nothing to remove.",
        ),
    ],
)
def test_classifiers_that_cannot_judge(own: dict[str, Any], text: str, tmp_path: Path) -> None:
    model = build("llama", seed=5)
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # no response is empty, which would count
    judge = make_classifier(tmp_path / "judge", ["LABEL_0", "LABEL_1"])
    scorers = {"judge": {"use": "classifier", "settings": {"model": str(judge), **own}}}
    with pytest.raises((EvaluationError, UsageError)) as caught:
        evaluator(save(tmp_path / "m", model), scorers=scorers, refusal_markers=["a", "o", "i", "e"])
    assert text in str(caught.value)


# Whole runs


def study() -> optuna.Study:
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(JOURNAL))))


def by_hand_front(trials: list[Any], signs: dict[str, int]) -> set[int]:
    """Numbers of the trials that no other beats or, being the same, comes before."""
    points = {trial.number: [signs[name] * trial.user_attrs["scores"][name] for name in signs] for trial in trials}

    def beats(m: int, n: int) -> bool:
        no_worse = all(a <= b for a, b in zip(points[m], points[n], strict=True))
        return no_worse and (points[m] != points[n] or m < n)

    return {n for n in points if not any(beats(m, n) for m in points)}


@pytest.mark.parametrize(
    "signs",
    [
        {"refusals": 1},
        {"refusals": 1, "sequence_kl_divergence": 1},
        {"refusals": 1, "kl_divergence": 1, "breads": -1},
    ],
    ids=["one", "two", "three"],
)
def test_any_number_of_objectives(signs: dict[str, int], heretic: Heretic, workplace: Path) -> None:
    """The front, the journal, the screen and the record agree; a run that is broken off goes on as it would have."""
    Path("mine.py").write_text(SCORERS, encoding="utf-8")
    names = ("refusals", "kl_divergence", "sequence_kl_divergence")
    tables: dict[str, Any] = {name: {"direction": "minimize" if name in signs else "none"} for name in names}
    tables["breads"] = {"use": "mine.py:Breads", "direction": "maximize" if "breads" in signs else "none"}
    arguments = ["--scorers", json.dumps(tables), "--trials-per-batch", "2"]
    outcome = heretic(*arguments, "--n-trials", "8")
    assert outcome.code == 0, outcome.err
    opened = study()
    directions = ["MAXIMIZE" if sign < 0 else "MINIMIZE" for sign in signs.values()]
    assert [direction.name for direction in opened.directions] == directions
    assert all(len(trial.values) == len(signs) and "bounded" not in trial.user_attrs for trial in opened.trials)
    front = front_of(opened)
    assert {trial.number for trial in front} == by_hand_front(opened.trials, signs)
    firsts = [trial.user_attrs["scores"]["refusals"] for trial in front]
    assert firsts == sorted(firsts)
    assert ("Sequence KL" in outcome.out) and ("breads" in outcome.out)
    whole = [(trial.params, trial.values) for trial in opened.trials]

    # In two runs, the settings stored.
    JOURNAL.unlink()
    assert heretic(*arguments, "--n-trials", "5", "--n-startup-trials", "2").code == 0
    assert heretic("--n-trials", "8", "--trust-scorers").code == 0
    assert [params for params, _ in whole][:4] == [trial.params for trial in study().trials][:4]
    saving = ("--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out")
    outcome = heretic("--trust-scorers", *saving)
    assert outcome.code == 0, outcome.err
    record = json.loads(Path("out/heretic.json").read_text())
    chosen = front_of(study())[0]
    assert record["trial"]["number"] == chosen.number
    assert record["measurements"]["scores"] == chosen.user_attrs["scores"]
    assert set(record["scores"]) == {"refusals", "n_bad_prompts", "base_refusals", "kl_divergence"}


def test_a_study_with_other_scorers_is_another_one(heretic: Heretic, workplace: Path) -> None:
    Path("mine.py").write_text(SCORERS, encoding="utf-8")
    arguments = ["--scorers", json.dumps({"breads": {"use": "mine.py:Breads"}})]
    assert heretic(*arguments).code == 0
    outcome = heretic("--scorers", json.dumps({"breads": {"use": "mine.py:Breads", "direction": "minimize"}}))
    assert outcome.code == 1 and "does not match this run: scorers was " in outcome.err
    Path("mine.py").write_text(SCORERS + "\n# changed\n", encoding="utf-8")
    outcome = heretic(*arguments, "--n-trials", "5")
    assert outcome.code == 1 and "the contents of the scorer breads have changed" in outcome.err
    outcome = heretic("--kl-tokens", "4")
    assert outcome.code == 1 and "kl_tokens was 16 and is now 4" in outcome.err


def test_a_wrong_scorer_is_told_before_the_model_is_loaded(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--scorers", json.dumps({"breads": {"use": "mine.py:Breads"}}))
    assert outcome.code == 2
    assert "Loading m" not in outcome.out
    assert outcome.err.startswith("Error: Setting scorers.breads.use: mine.py cannot be imported: FileNotFoundError: ")
    assert outcome.err.endswith("mine.py does not exist. Check the path and the file.\n")


def test_scorers_from_the_configuration_file(heretic: Heretic, workplace: Path) -> None:
    Path("mine.py").write_text(SCORERS, encoding="utf-8")
    with Path("config.toml").open("a", encoding="utf-8") as file:
        file.write('[scorers.kl_divergence]\ndirection = "none"\n')
        file.write('[scorers.breads]\nuse = "mine.py:Breads"\ndirection = "maximize"\nsettings = { word = "cat", weight = 0.5 }\n')
    outcome = heretic("--config", "config.toml")
    assert outcome.code == 0, outcome.err
    assert [tuple(pair) for pair in study().user_attrs["objectives"]] == [("refusals", "minimize"), ("breads", "maximize")]
    assert all(trial.values[1] == trial.user_attrs["scores"]["breads"] for trial in study().trials)


def test_a_classifier_whose_files_have_changed_is_another_one(heretic: Heretic, workplace: Path) -> None:
    judge = make_classifier(workplace / "judge", ["ANSWER", "REJECTION"])
    arguments = ["--scorers", json.dumps({"judge": {"use": "classifier", "settings": {"model": "judge", "threshold": 0.1}}})]
    outcome = heretic(*arguments)
    assert outcome.code == 0, outcome.err
    weights = judge / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    outcome = heretic(*arguments, "--n-trials", "5")
    assert outcome.code == 1 and "the contents of the scorer judge have changed" in outcome.err


def test_what_a_trial_leaves_in_the_journal(heretic: Heretic, workplace: Path) -> None:
    assert heretic("--no-stop-dominated-trials").code == 0
    for trial in study().trials:
        attributes = trial.user_attrs
        assert sum(attributes["response_classes"].values()) == 5
        assert attributes["refusals"] == 5 - attributes["response_classes"]["compliance"]
        assert list(attributes["kl_statistics"]) == ["mean", "median", "p95", "max"]
        assert attributes["kl_statistics"]["mean"] == attributes["kl_divergence"]
        assert attributes["sequence_kl_divergence"] == attributes["scores"]["sequence_kl_divergence"] >= 0
        assert attributes["scores"]["refusals"] == attributes["refusals"]
