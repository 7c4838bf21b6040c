"""The search: what it proposes, what it records, the front it finds. Scores are made up here; real ones are in `test_checkpoint.py`."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from heretic.config import Settings
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.errors import Aborted, CheckpointError, TrialError
from heretic.evaluator import Score
from heretic.scoring.scorers import divergence_objective
from heretic.study.front import ablation_of, pareto_front, refusal_limit
from heretic.study.samplers import Sampling
from heretic.study.search import Search
from heretic.study.space import search_space

COMPONENTS = ["attn.o_proj", "mlp.down_proj"]
LAST_LAYER = 10
SETTINGS = Settings(model="m")
ScoreTrials = Callable[..., Sequence[Score | Exception]]


def search(path: Path, seed: int = 1, n_startup_trials: int = 5) -> Search:
    """A search on the journal at `path`, opened as Optuna would."""
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name="heretic",
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    return Search(study, path, search_space(SETTINGS, COMPONENTS, LAST_LAYER), Sampling(seed, n_startup_trials))


def made_up(ablation: Ablation) -> Score:
    """A score that depends on all parameters: refusals fall and divergence rises with the weights."""
    strength = sum(p.max_weight + p.min_weight - p.max_weight_position for p in ablation.parameters.values())
    return Score(max(0, round(20 - 6 * strength)), 0.02 * strength**2 + (ablation.direction_index or 0.2) / 10)


def score(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
    return [made_up(ablation) for ablation in ablations]


def scaled(result: Score) -> tuple[float, float]:
    refusals = result.refusals / 20
    return refusals, divergence_objective(result.kl_divergence, refusals, scale=1.0, target=0.01)


def run(path: Path, n_trials: int, trials_per_batch: int = 1, score: ScoreTrials = score, **more: Any) -> list[FrozenTrial]:
    """Open the search, run up to `n_trials`, return the trials."""
    opened = search(path)
    opened.run(n_trials, score, scaled, trials_per_batch, **more)
    return opened.trials


def proposals(trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    return [trial.params for trial in trials if trial.state == TrialState.COMPLETE]


def interrupted_at(n: int) -> ScoreTrials:
    """A score during which the user leaves, once `n` trials have been scored."""
    n_scored = 0

    def score(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
        nonlocal n_scored
        if n_scored + len(ablations) > n:
            raise KeyboardInterrupt
        n_scored += len(ablations)
        return [made_up(ablation) for ablation in ablations]

    return score


# What is proposed


def test_proposals_lie_in_the_search_ranges(tmp_path: Path) -> None:
    scopes = set()
    for trial in run(tmp_path / "j.jsonl", 25):
        attributes = trial.user_attrs
        scopes.add(trial.params["direction_scope"])
        index = attributes["direction_index"]
        assert (index is None) == (trial.params["direction_scope"] == "per layer")
        assert index is None or 0.4 <= index <= 0.9
        assert list(attributes["parameters"]) == COMPONENTS
        for p in (ComponentParameters(**values) for values in attributes["parameters"].values()):
            assert 0.0 <= p.max_weight <= 3.0
            assert 0.3 <= p.max_weight_position <= 1.0
            assert 0.0 <= p.min_weight <= p.max_weight
            assert 1 / LAST_LAYER <= p.min_weight_distance <= 1.0
        assert ablation_of(trial) == Ablation(index, {c: ComponentParameters(**attributes["parameters"][c]) for c in COMPONENTS})
    assert scopes == {"global", "per layer"}


@pytest.mark.parametrize("last_layer", [0, 1])
def test_models_of_one_and_two_layers(last_layer: int, tmp_path: Path) -> None:
    opened = search(tmp_path / "j.jsonl")
    opened.space = search_space(SETTINGS, COMPONENTS, last_layer)
    opened.run(3, score, scaled)
    for trial in opened.trials:
        assert all(values["min_weight_distance"] == 1.0 for values in trial.user_attrs["parameters"].values())


def test_startup_trials_differ_and_the_seed_decides_them(tmp_path: Path) -> None:
    first = proposals(run(tmp_path / "a.jsonl", 5))
    assert len({str(p) for p in first}) == 5
    assert proposals(run(tmp_path / "b.jsonl", 5)) == first
    other = search(tmp_path / "c.jsonl", seed=2)
    other.run(5, score, scaled)
    assert not {str(p) for p in proposals(other.trials)} & {str(p) for p in first}


@pytest.mark.parametrize("trials_per_batch", [1, 4])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(trials_per_batch: int, tmp_path: Path) -> None:
    whole = proposals(run(tmp_path / "whole.jsonl", 16, trials_per_batch))
    assert len({str(p) for p in whole}) == 16
    broken = tmp_path / "broken.jsonl"
    for n in (0, 3, 1, 5, 4, 2):  # trials until the next interruption: within startup, after it, at once again
        with pytest.raises(KeyboardInterrupt):
            run(broken, 16, trials_per_batch, interrupted_at(n))
    trials = run(broken, 16, trials_per_batch)
    assert proposals(trials) == whole
    assert [trial.number for trial in trials] == list(range(16)), "trials that were cut off are finished, not replaced"
    assert all(trial.state == TrialState.COMPLETE for trial in trials)


@pytest.mark.parametrize("trials_per_batch", [1, 4])
def test_a_batch_that_is_given_up_is_scored_first_by_whoever_goes_on(trials_per_batch: int, tmp_path: Path) -> None:
    whole = proposals(run(tmp_path / "whole.jsonl", 16, trials_per_batch))
    path = tmp_path / "j.jsonl"
    opened = search(path)

    def give_up(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
        raise Aborted

    opened.run(8, score, scaled, trials_per_batch)
    opened.run(16, give_up, scaled, trials_per_batch)
    n_running = len([trial for trial in opened.trials if trial.state == TrialState.RUNNING])
    assert (n_running, opened.n_done) == (trials_per_batch, 8)
    opened.run(12, score, scaled, trials_per_batch)
    assert opened.n_done == 12 and all(trial.state == TrialState.COMPLETE for trial in opened.trials)
    opened.run(16, give_up, scaled, trials_per_batch)
    assert proposals(run(path, 16, trials_per_batch)) == whole


def test_a_search_killed_between_two_records_of_a_shared_pass_repeats_nothing(tmp_path: Path) -> None:
    def kill(trial: FrozenTrial) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "j.jsonl"
    for _ in range(6):  # one trial of four is recorded each time
        with pytest.raises(KeyboardInterrupt):
            run(path, 12, 4, on_trial=kill)
    trials = proposals(run(path, 12, 4))
    assert len({str(p) for p in trials}) == 12
    assert trials == proposals(run(tmp_path / "whole.jsonl", 12, 4))
    assert trials[:5] == proposals(run(tmp_path / "single.jsonl", 5)), "startup trials are the same in whatever passes they run"


def test_a_trial_cut_off_while_it_was_drawn_is_closed_and_drawn_again(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    opened = search(path)
    opened.run(2, score, scaled)
    opened.study.ask()  # nothing more is written
    trials = run(path, 4)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2 + [TrialState.FAIL] + [TrialState.COMPLETE] * 2
    assert proposals(trials) == proposals(run(tmp_path / "whole.jsonl", 4))


def test_a_search_that_is_continued_proposes_what_a_longer_one_would_have(tmp_path: Path) -> None:
    run(tmp_path / "a.jsonl", 6)
    run(tmp_path / "a.jsonl", 9)
    assert proposals(run(tmp_path / "a.jsonl", 12)) == proposals(run(tmp_path / "b.jsonl", 12))


# What is recorded


def test_what_a_trial_leaves(tmp_path: Path) -> None:
    shown: list[FrozenTrial] = []
    trials = run(tmp_path / "j.jsonl", 7, 3, on_trial=shown.append)
    assert [trial.number for trial in shown] == [trial.number for trial in trials] == list(range(7))
    for trial in trials:
        expected = made_up(ablation_of(trial))
        assert trial.state == TrialState.COMPLETE
        assert (trial.user_attrs["refusals"], trial.user_attrs["kl_divergence"]) == (expected.refusals, expected.kl_divergence)
        assert type(trial.user_attrs["refusals"]) is int and type(trial.user_attrs["kl_divergence"]) is float
        assert tuple(trial.values) == scaled(expected)
        assert trial.user_attrs["seconds"] >= 0
        assert isinstance(trial.distributions["direction_index"], FloatDistribution)


def test_a_trial_that_cannot_be_scored_fails_alone(tmp_path: Path) -> None:
    def score(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
        results: list[Score | Exception] = [made_up(ablation) for ablation in ablations]
        results[0] = TrialError("the model returned logits that are not finite (NaN or infinite)")
        return results

    trials = run(tmp_path / "j.jsonl", 6, 3, score)
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE] * 2
    assert trials[0].user_attrs["failure"] == "TrialError: the model returned logits that are not finite (NaN or infinite)"
    assert trials[0].values is None
    assert len(pareto_front(trials)) >= 1
    assert len(run(tmp_path / "j.jsonl", 6, 3)) == 6, "a failure is on record, and not tried again"


CRASH = "RuntimeError: a kernel does not like it (this is a bug in heretic; --debug shows where it happened)."


def test_a_crash_in_a_shared_pass_fails_only_who_causes_it(tmp_path: Path) -> None:
    def score(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
        if any(ablation.direction_index is None for ablation in ablations):
            raise RuntimeError("a kernel does not like it")
        return [made_up(ablation) for ablation in ablations]

    trials = run(tmp_path / "j.jsonl", 12, 4, score)
    for trial in trials:
        crashes = trial.user_attrs["direction_index"] is None
        assert trial.state == (TrialState.FAIL if crashes else TrialState.COMPLETE)
        assert trial.user_attrs.get("failure") == (CRASH if crashes else None)
    assert {trial.state for trial in trials} == {TrialState.FAIL, TrialState.COMPLETE}


def test_whoever_shows_a_trial_knows_how_many_of_its_batch_are_scored(tmp_path: Path) -> None:
    opened = search(tmp_path / "j.jsonl")
    seen = []
    opened.run(7, score, scaled, 3, on_trial=lambda trial: seen.append((opened.n_done, opened.n_scored)))
    assert seen == [(1, 3), (2, 3), (3, 3), (4, 6), (5, 6), (6, 6), (7, 7)]


def test_a_wish_to_stop_is_granted_after_the_running_trials(tmp_path: Path) -> None:
    opened = search(tmp_path / "j.jsonl")
    opened.run(9, score, scaled, 2, should_stop=lambda: opened.n_done >= 4)
    assert opened.n_done == len(opened.trials) == 4


def test_a_batch_is_asked_for_when_the_one_before_is_told(tmp_path: Path) -> None:
    opened = search(tmp_path / "j.jsonl")
    seen = []

    def note(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
        states = [trial.state for trial in opened.trials]
        seen.append((len(ablations), states.count(TrialState.COMPLETE), states.count(TrialState.RUNNING)))
        return score(ablations)

    opened.run(9, note, scaled, 4)
    assert seen == [(4, 0, 4), (4, 4, 4), (1, 8, 1)], "trials of the batch, told before it, and asked for"


def test_a_journal_that_cannot_be_written_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = search(tmp_path / "j.jsonl")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def score_until_full(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
        monkeypatch.setattr(JournalFileBackend, "append_logs", full)
        return score(ablations)

    with pytest.raises(CheckpointError, match=r"No space left on device\. Free some space, then run the same command again"):
        opened.run(3, score_until_full, scaled)
    monkeypatch.undo()
    assert len(proposals(run(tmp_path / "j.jsonl", 3))) == 3


# The front


def complete(refusals: int, kl_divergence: float, **more: Any) -> FrozenTrial:
    return create_trial(values=[0.0, 0.0], user_attrs={"refusals": refusals, "kl_divergence": kl_divergence, **more})


def test_the_front_is_what_no_trial_beats() -> None:
    generator = random.Random(0)
    for _ in range(300):
        n = generator.randrange(1, 30)
        trials = [complete(generator.randrange(8), generator.randrange(8) / 8, bounded=generator.random() < 0.2) for _ in range(n)]
        trials.append(create_trial(state=TrialState.FAIL, user_attrs={"refusals": 0, "kl_divergence": 0.0}))
        points = {
            (trial.user_attrs["refusals"], trial.user_attrs["kl_divergence"]) for trial in trials[:-1] if not trial.user_attrs["bounded"]
        }
        unbeaten = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        front = [(trial.user_attrs["refusals"], trial.user_attrs["kl_divergence"]) for trial in pareto_front(trials)]
        assert front == sorted(unbeaten), "each once, fewest refusals first, divergence falling"
    assert pareto_front([]) == []


def test_of_equals_the_first_is_on_the_front() -> None:
    trials = [complete(3, 0.5), complete(3, 0.5), complete(2, 0.5)]
    assert pareto_front(trials[:2]) == trials[:1]
    assert pareto_front(trials) == trials[2:]


def test_a_trial_is_stopped_only_where_it_cannot_be_on_the_front() -> None:
    generator = random.Random(1)
    for _ in range(200):
        trials = [complete(generator.randrange(8), generator.randrange(8) / 8) for _ in range(generator.randrange(6))]
        limit = refusal_limit(trials)
        newcomer = complete(generator.randrange(8), generator.randrange(8) / 8)
        if newcomer.user_attrs["refusals"] > limit(newcomer.user_attrs["kl_divergence"]):
            assert newcomer not in pareto_front([*trials, newcomer])
    assert refusal_limit([])(0.5) == math.inf
