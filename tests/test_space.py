"""The search space of a model, what is drawn from it, the samplers, and points that are tried first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from heretic.config import SamplerName, Settings
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.editing.architecture import COMPONENTS as ALL_COMPONENTS
from heretic.errors import UsageError
from heretic.evaluator import Score
from heretic.parameters import Choice, Range
from heretic.study.front import ablation_of
from heretic.study.samplers import Sampling, check_sampler
from heretic.study.search import Search
from heretic.study.space import SearchSpace, search_space
from test_search import made_up, scaled, score

COMPONENTS = ["attn.o_proj", "mlp.down_proj"]
SAMPLERS: list[SamplerName] = ["tpe", "gp", "nsgaii", "random"]


def settings(**given: Any) -> Settings:
    return Settings.model_validate({"model": "m", **given})


def space(last_layer: int = 10, separating_layer: int | None = None, **given: Any) -> SearchSpace:
    return search_space(settings(**given), COMPONENTS, last_layer, separating_layer)


def start(**given: Any) -> SearchSpace:
    """What the first trials are drawn from."""
    found = space(**given).start
    assert found is not None
    return found


def run(
    path: Path, n_trials: int, sampler: SamplerName = "tpe", per_batch: int = 1, seed: int = 1, n_startup: int = 5, **given: Any
) -> list[FrozenTrial]:
    """Open the search in the journal at `path`, run up to `n_trials`, return the trials."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name="heretic", directions=["minimize", "minimize"], load_if_exists=True)
    checked = settings(**given)
    search = Search(study, path, search_space(checked, COMPONENTS, 10), Sampling(seed, n_startup, sampler, checked.first_trials))
    search.run(n_trials, score, scaled, per_batch)
    return search.trials


# The space


def ranges(choices: dict[str, Choice]) -> dict[str, Any]:
    return {name: (c.low, c.high) if isinstance(c, Range) else c for name, c in choices.items()}


def kernels(attention: tuple[float, float], mlp: tuple[float, float], **rest: tuple[float, float]) -> dict[str, Any]:
    """Ranges of both components' kernels."""
    usual = {"min_weight": (0.0, 1.0), **rest}
    strengths = {"attn.o_proj": attention, "mlp.down_proj": mlp}
    return {f"{c}.{name}": value for c, strength in strengths.items() for name, value in {"max_weight": strength, **usual}.items()}


def test_the_default_space() -> None:
    expected = kernels((0.0, 3.0), (0.0, 3.0), max_weight_position=(0.3, 1.0), min_weight_distance=(0.1, 1.0))
    assert ranges(space().choices()) == {"direction_index": (0.4, 0.9)} | expected
    assert space().direction_scope == ["global", "per layer"]


def test_first_trials_are_drawn_from_narrower_ranges() -> None:
    expected = kernels((0.8, 1.5), (0.0, 1.5), max_weight_position=(0.6, 1.0), min_weight_distance=(0.1, 0.6))
    assert ranges(start().choices()) == {"direction_index": (0.4, 0.9)} | expected
    found = ranges(start(parameters={"max_weight": {"attn.o_proj": 1.0}, "max_weight_position": {"low": 0, "high": 1}}).choices())
    assert found["attn.o_proj.max_weight"] == 1.0 and found["mlp.down_proj.max_weight"] == (0.0, 1.5)
    assert found["attn.o_proj.max_weight_position"] == (0.0, 1.0), "what the user gives is for all trials"
    given = {"max_weight": 1.0, "max_weight_position": {"low": 0.5, "high": 1}, "min_weight_distance": 0.5}
    assert space(parameters=given).start is None


def test_every_kind_of_mlp_can_be_left_out_from_the_beginning() -> None:
    first = search_space(settings(), ALL_COMPONENTS, 10).start
    assert first is not None
    found = {name: kernel.max_weight for name, kernel in first.components.items()}
    assert {name: choice.low for name, choice in found.items() if isinstance(choice, Range)} == {
        "attn.o_proj": 0.8,
        "mixer.out_proj": 0.8,
        "mlp.down_proj": 0.0,
        "mlp.experts.down_proj": 0.0,
        "mlp.shared_experts.down_proj": 0.0,
    }
    given = settings(parameters={"max_weight": {"low": 0.5, "high": 1.0}})
    assert search_space(given, COMPONENTS, 10).components["mlp.down_proj"].max_weight == Range(low=0.5, high=1.0)


@pytest.mark.parametrize(
    ("separating_layer", "index", "position", "first_position"),
    [(0, 0.0, 0.0, 0.0), (2, 0.2, 0.2, 0.2), (3, 0.3, 0.3, 0.3), (5, 0.4, 0.3, 0.5), (6, 0.4, 0.3, 0.6), (10, 0.4, 0.3, 0.6)],
)
def test_automatic_ranges_begin_where_the_prompts_part(separating_layer: int, index: float, position: float, first_position: float) -> None:
    found = ranges(space(separating_layer=separating_layer).choices())
    assert found["direction_index"] == (pytest.approx(index), 0.9)
    assert found["mlp.down_proj.max_weight_position"] == (pytest.approx(position), 1.0)
    assert ranges(start(separating_layer=separating_layer).choices())["mlp.down_proj.max_weight_position"] == (
        pytest.approx(first_position),
        1.0,
    )
    fixed = {"direction_index": {"low": 0.5, "high": 0.6}, "max_weight_position": {"mlp.down_proj": 0.7}}
    found = ranges(space(separating_layer=separating_layer, parameters=fixed).choices())
    assert found["direction_index"] == (0.5, 0.6)
    assert found["mlp.down_proj.max_weight_position"] == 0.7
    assert found["attn.o_proj.max_weight_position"] == (pytest.approx(position), 1.0)


def test_a_kernel_reaches_over_one_layer_at_least() -> None:
    def distance(last_layer: int, **given: Any) -> Any:
        return ranges(space(last_layer, **given).choices())["mlp.down_proj.min_weight_distance"]

    assert distance(0) == distance(1) == (1.0, 1.0)
    assert distance(4) == (0.25, 1.0)
    assert distance(4, parameters={"min_weight_distance": 0.1}) == 0.25
    assert distance(4, parameters={"min_weight_distance": {"low": 0.5, "high": 1}}) == (0.5, 1.0)


def test_disabled_components_are_left_out() -> None:
    assert list(space(disabled_components=["attn.o_proj"]).components) == ["mlp.down_proj"]


def test_a_space_survives_being_stored() -> None:
    made = space(parameters={"max_weight": {"low": 0.5, "high": 2, "log": True}, "min_weight": 0.5, "direction_scope": ["global"]})
    assert SearchSpace.model_validate(made.model_dump(mode="json")) == made


HAS = "Its components are attn.o_proj, mlp.down_proj."
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"parameters": {"max_weight": {"mlp.down_prj": 1.0}}},
        f'parameters.max_weight names the component "mlp.down_prj", which the model does not have (did you mean mlp.down_proj?). {HAS}',
    ),
    (
        {"parameters": {"min_weight_distance": {"experts": {"low": 0.1, "high": 0.2}}}},
        f"parameters.min_weight_distance names the component experts, which the model does not have. {HAS}",
    ),
    (
        {"first_trials": [{"max_weight": 1}, {"min_weight": {"mlp": 1}}]},
        f"first_trials.1.min_weight names the component mlp, which the model does not have. {HAS}",
    ),
    (
        {"disabled_components": ["o_proj"]},
        f"disabled_components names the component o_proj, which the model does not have (did you mean attn.o_proj?). {HAS}",
    ),
    (
        {"disabled_components": COMPONENTS},
        "disabled_components disables all components of the model: attn.o_proj, mlp.down_proj.",
    ),
    (
        {"first_trials": [{"max_weight": {"mlp.down_proj": 4.0}}]},
        "first_trials.0.max_weight is 4, but the search space of mlp.down_proj is from 0 to 3. Change parameters.max_weight.",
    ),
    (
        {"parameters": {"direction_index": 0.5}, "first_trials": [{"direction_index": 0.6}]},
        "first_trials.0.direction_index is 0.6, but the search space is 0.5 only. Change parameters.direction_index.",
    ),
    (
        {"parameters": {"direction_scope": "global"}, "first_trials": [{"direction_scope": "per layer"}]},
        "first_trials.0.direction_scope is 'per layer', which parameters.direction_scope does not contain.",
    ),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_settings_that_do_not_fit_the_model(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        space(**given)
    assert str(caught.value) == message


# What is drawn


def test_constants_leave_the_search_space(tmp_path: Path) -> None:
    given = {
        "direction_scope": ["global"],
        "direction_index": 0.5,
        "max_weight": {"attn.o_proj": 1.0},
        "max_weight_position": 0.75,
        "min_weight": {"low": 0.25, "high": 0.25},
        "min_weight_distance": {"mlp.down_proj": 0.5, "attn.o_proj": {"low": 0.1, "high": 0.2, "log": True}},
    }
    for trial in run(tmp_path / "j.jsonl", 8, parameters=given):
        assert set(trial.params) == {"mlp.down_proj.max_weight", "attn.o_proj.min_weight_distance"}
        distribution = trial.distributions["attn.o_proj.min_weight_distance"]
        assert (distribution.low, distribution.high, distribution.log) == (0.1, 0.2, True)  # type: ignore[attr-defined]
        weight, distance = trial.params["mlp.down_proj.max_weight"], trial.params["attn.o_proj.min_weight_distance"]
        kernels = {
            "attn.o_proj": ComponentParameters(1.0, 0.75, 0.25, distance),
            "mlp.down_proj": ComponentParameters(weight, 0.75, 0.25 * weight, 0.5),
        }
        assert ablation_of(trial) == Ablation(0.5, kernels)


def test_no_direction_index_is_searched_where_every_layer_uses_its_own(tmp_path: Path) -> None:
    (trial,) = run(tmp_path / "j.jsonl", 1, parameters={"direction_scope": "per layer"}, disabled_components=["mlp.down_proj"])
    assert set(trial.params) == {
        f"attn.o_proj.{name}" for name in ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")
    }
    assert ablation_of(trial).direction_index is None
    assert list(ablation_of(trial).parameters) == ["attn.o_proj"]


def test_a_search_of_constants_alone(tmp_path: Path) -> None:
    everything = {"direction_scope": "global", "direction_index": 0.5, "max_weight": 1, "max_weight_position": 0.5, "min_weight": 1}
    for sampler in SAMPLERS:
        trials = run(tmp_path / f"{sampler}.jsonl", 7, sampler, parameters={**everything, "min_weight_distance": 0.5})
        assert [trial.params for trial in trials] == [{}] * 7
        assert {str(ablation_of(trial)) for trial in trials} == {str(ablation_of(trials[0]))}


# Samplers


def proposals(trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    return [trial.params for trial in trials if trial.state == TrialState.COMPLETE]


@pytest.mark.parametrize("per_batch", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_repeats_a_run_and_goes_on_with_it(sampler: SamplerName, per_batch: int, tmp_path: Path) -> None:
    n_trials = 8 if sampler == "gp" else 16  # its proposals take seconds
    whole = proposals(run(tmp_path / "whole.jsonl", n_trials, sampler, per_batch))
    # Children of the genetic algorithm are now and then copies of a parent.
    assert len({str(p) for p in whole}) >= (12 if sampler == "nsgaii" else n_trials)
    for n in range(4, n_trials + 1, 4):
        parts = run(tmp_path / "parts.jsonl", n, sampler, per_batch)
    assert proposals(parts) == whole
    assert proposals(run(tmp_path / "other.jsonl", 3, sampler, per_batch, seed=2)) != whole[:3]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_after_an_interruption(sampler: SamplerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = proposals(run(tmp_path / "whole.jsonl", 8, sampler, 4))

    def interrupted(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
        raise KeyboardInterrupt

    for n in (0, 4):
        run(tmp_path / "broken.jsonl", n, sampler, 4)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("test_space.score", interrupted)
            run(tmp_path / "broken.jsonl", 8, sampler, 4)
    assert proposals(run(tmp_path / "broken.jsonl", 8, sampler, 4)) == whole


def test_samplers_differ_after_the_startup_trials(tmp_path: Path) -> None:
    found = {sampler: proposals(run(tmp_path / f"{sampler}.jsonl", 7, sampler)) for sampler in SAMPLERS}
    assert found["gp"][:6] == found["tpe"][:6], "startup trials are random, from the same seeds; the first six from narrower ranges"
    assert found["nsgaii"][:5] == found["random"][:5]
    assert all(mine != other for mine, other in zip(found["tpe"][:5], found["random"][:5], strict=True))
    assert len({str(trials[6]) for trials in found.values()}) == 4


def test_first_trials_lie_in_the_narrower_ranges(tmp_path: Path) -> None:
    n_startup, narrow = 40, start().choices()
    assert [Sampling(0, n, sampler).n_start_trials for n, sampler in ((3, "tpe"), (60, "gp"), (60, "nsgaii"))] == [6, 30, 0]
    trials = run(tmp_path / "j.jsonl", n_startup, n_startup=n_startup)
    inside = [
        all(choice.low <= trial.params[name] <= choice.high for name, choice in narrow.items() if isinstance(choice, Range))
        for trial in trials
    ]
    assert all(inside[:20]) and not any(inside[20:])
    wide = space().choices()
    for name, choice in wide.items():
        assert isinstance(choice, Range)
        assert all(choice.low <= trial.params[name] <= choice.high for trial in trials)
        distribution = trials[0].distributions[name]
        assert (distribution.low, distribution.high) == (choice.low, choice.high), "the sampler learns from them, too"


def test_a_sampler_can_be_changed_on_the_way(tmp_path: Path) -> None:
    for n, sampler in enumerate([*SAMPLERS, *SAMPLERS], start=5):
        trials = run(tmp_path / "j.jsonl", n, sampler)
    assert len(proposals(trials)) == 12


def test_gp_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sampler("gp")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        check_sampler("gp")
    assert str(caught.value) == 'sampler = "gp" needs SciPy, which is not installed: pip install scipy, or choose another --sampler.'
    check_sampler("tpe")


# Points that are tried first

FIRST = [
    {"direction_scope": "global", "direction_index": 0.5, "max_weight": 1.0, "max_weight_position": 0.6, "min_weight": 1.0},
    {"direction_scope": "per layer", "max_weight": {"mlp.down_proj": 0.9}},
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_first_trials_come_first_and_count(sampler: SamplerName, tmp_path: Path) -> None:
    trials = run(tmp_path / "j.jsonl", 8, sampler, 4, first_trials=FIRST)
    assert [trial.number for trial in trials] == list(range(8))
    first, second, *rest = trials
    ablation = ablation_of(first)
    assert ablation.direction_index == 0.5
    assert {(p.max_weight, p.max_weight_position, p.min_weight) for p in ablation.parameters.values()} == {(1.0, 0.6, 1.0)}
    assert ablation_of(second).direction_index is None
    assert ablation_of(second).parameters["mlp.down_proj"].max_weight == 0.9
    assert ablation_of(second).parameters["attn.o_proj"].max_weight != 0.9, "what is left out is drawn"
    assert [trial.user_attrs.get("first_trial") is not None for trial in trials] == [True, True] + [False] * 6
    assert first.user_attrs["refusals"] == made_up(ablation).refusals
    without = run(tmp_path / "without.jsonl", 8, sampler, 4)
    assert proposals(rest)[:1] == proposals(without)[2:3], "the random trials after them are those of a run without"


def test_first_trials_that_were_cut_off_are_not_lost_nor_repeated(tmp_path: Path) -> None:
    whole = proposals(run(tmp_path / "whole.jsonl", 6, first_trials=FIRST))
    path = tmp_path / "broken.jsonl"
    run(path, 1, first_trials=FIRST)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.load_study(study_name="heretic", storage=storage)
    study.ask().set_user_attr("first_trial", {"x": 1})  # killed while it was drawn
    trials = run(path, 6, first_trials=FIRST)
    assert trials[1].state == TrialState.FAIL
    assert proposals(trials) == whole


def test_first_trials_of_a_study_that_has_begun_are_tried_next(tmp_path: Path) -> None:
    run(tmp_path / "j.jsonl", 3)
    trials = run(tmp_path / "j.jsonl", 6, first_trials=FIRST)
    assert [trial.user_attrs.get("first_trial") is not None for trial in trials] == [False] * 3 + [True, True, False]


def test_what_is_constant_in_the_space_may_stand_in_a_first_trial(tmp_path: Path) -> None:
    given: dict[str, Any] = {"parameters": {"max_weight": 1.0}, "first_trials": [{"max_weight": 1.0, "min_weight": 0.5}]}
    (trial,) = run(tmp_path / "j.jsonl", 1, **given)
    assert trial.user_attrs["first_trial"] == {"attn.o_proj.min_weight": 0.5, "mlp.down_proj.min_weight": 0.5}
