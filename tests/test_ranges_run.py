"""Search ranges, disabled components and samplers in whole runs on a tiny model: what is told, stored, kept and saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console as RichConsole
from transformers import AutoModelForCausalLM

from conftest import SMALL, Outcome
from heretic.console import Console
from heretic.reporting.study_view import StudyView
from heretic.scoring.score_tables import Baseline
from test_parameters import INLINE, TABLES

Heretic = Callable[..., Outcome]
JOURNAL = Path("checkpoints/m.jsonl")


def study() -> optuna.Study:
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(JOURNAL))))


def part_in(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heretic.session.stages.separating_layer", lambda good, bad: layer)


def test_what_is_searched_is_told_with_the_layers_beside(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part_in(1, monkeypatch)
    assert (
        "Search space (harmless and harmful prompts separate in layer 1):\n"
        "  directions at 0.40 to 0.90 (layer 0.4 to 0.9)\n"
        "  attn.o_proj, mlp.down_proj: 0.00 to 3.00 at 0.30 to 1.00 (layer 0.3 to 1.0), 0.00 to 1.00 of it at ±1.00 (1.0 layers)\n"
        "  first trials:\n"
        "    attn.o_proj: 0.80 to 1.50 at 0.60 to 1.00 (layer 0.6 to 1.0), 0.00 to 1.00 of it at ±1.00 (1.0 layers)\n"
        "    mlp.down_proj: 0.00 to 1.50 at 0.60 to 1.00 (layer 0.6 to 1.0), 0.00 to 1.00 of it at ±1.00 (1.0 layers)\n"
    ) in heretic().out
    part_in(0, monkeypatch)
    assert "directions at 0.00 to 0.90 (layer 0.0 to 0.9)" in heretic("--checkpoint-action", "restart").out
    given = '{"direction_scope": "per layer", "max_weight": 1, "min_weight": {"mlp.down_proj": 0.5}}'
    assert (
        "separate in layer 0):\n"
        "  attn.o_proj: 1.00 at 0.00 to 1.00 (layer 0.0 to 1.0), 0.00 to 1.00 of it at ±1.00 (1.0 layers)\n"
        "  mlp.down_proj: 1.00 at 0.00 to 1.00 (layer 0.0 to 1.0), 0.50 of it at ±1.00 (1.0 layers)\n"
    ) in heretic("--parameters", given, "--checkpoint-action", "restart").out
    constant = ("--parameters", '{"direction_scope": "per layer", "max_weight": 1, "max_weight_position": 0.5}')
    assert (
        "separate in layer 0):\n  attn.o_proj, mlp.down_proj: 1.00 at 0.50 (layer 0.5), 0.00 to 1.00 of it at ±1.00 (1.0 layers)\n"
        in heretic(*constant, "--checkpoint-action", "restart").out
    )


@pytest.mark.parametrize("table", [INLINE, TABLES], ids=["inline", "tables"])
def test_both_ways_to_write_ranges_are_searched(table: str, heretic: Heretic, workplace: Path) -> None:
    Path("ranges.toml").write_text(SMALL + table)
    outcome = heretic("--config", "ranges.toml")
    assert outcome.code == 0, outcome.err
    kernel = "0.80 to 1.50 at 0.60 to 1.00 (layer 0.6 to 1.0), 0.50 of it at ±1.00 (1.0 layers)"  # one layer at least, so the distances go
    assert f"):\n  directions at 0.40 to 0.90 (layer 0.4 to 0.9)\n  attn.o_proj, mlp.down_proj: {kernel}\n" in outcome.out
    for trial in study().trials:
        distributions = trial.distributions
        assert set(distributions) == {"direction_scope", "direction_index"} | {
            f"{c}.{name}" for c in ("attn.o_proj", "mlp.down_proj") for name in ("max_weight", "max_weight_position")
        }
        assert distributions["mlp.down_proj.max_weight"] == FloatDistribution(0.8, 1.5, log=True)
        assert distributions["direction_index"] == FloatDistribution(0.4, 0.9)
        for values in trial.user_attrs["parameters"].values():
            assert values["min_weight"] == 0.5 * values["max_weight"]


def test_a_wrong_range_ends_the_command_with_its_place(heretic: Heretic, workplace: Path) -> None:
    Path("ranges.toml").write_text(SMALL + '[parameters.max_weight]\n"mlp.down_proj" = { low = "a", high = 1.0 }\n')
    outcome = heretic("--config", "ranges.toml")
    assert (outcome.code, outcome.out, outcome.err) == (
        2,
        "",
        'Error: Setting parameters.max_weight."mlp.down_proj".low (in ranges.toml): Input should be a valid number, unable to parse '
        "string as a number, got 'a'.\n",
    )


def test_the_live_view_has_the_layer_beside(heretic: Heretic, workplace: Path) -> None:
    assert heretic("--parameters", '{"direction_scope": "global", "direction_index": 0.5}').code == 0
    trials = study().trials
    console = Console()
    console.rich = screen = RichConsole(width=120)
    view = StudyView(console, 3, 0, Baseline(5, 5), last_layer=7)
    view.show(trials[-1], trials, 3)
    with screen.capture() as captured:
        screen.print(view._render())
    assert captured.get().count("0.50 (layer 3.5)") >= 4  # the front, and the last trials


def test_settings_that_do_not_fit_the_model_end_the_run_before_there_is_a_study(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--parameters.max-weight", '{"mlp.dwn_proj": 1.0}')
    assert (outcome.code, outcome.err) == (
        2,
        'Error: parameters.max_weight names the component "mlp.dwn_proj", which the model does not have (did you mean mlp.down_proj?). '
        "Its components are attn.o_proj, mlp.down_proj.\n",
    )
    assert not JOURNAL.exists()


def test_a_missing_library_is_told_before_anything_is_loaded(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heretic.study.samplers.importlib.util.find_spec", lambda name: None)
    outcome = heretic("--sampler", "gp")
    assert (outcome.code, outcome.err) == (
        2,
        'Error: sampler = "gp" needs SciPy, which is not installed: pip install scipy, or choose another --sampler.\n',
    )
    assert "Prompts" not in outcome.out


def test_a_study_keeps_the_space_that_it_began_with(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part_in(1, monkeypatch)
    assert heretic("--n-trials", "4", "--sampler", "nsgaii").code == 0
    part_in(0, monkeypatch)  # as on a device that rounds differently
    assert heretic("--n-trials", "6").code == 0
    trials = study().trials
    assert len(trials) == 6
    assert all(trial.distributions == trials[0].distributions for trial in trials)
    assert "NSGAIISampler:generation" in trials[5].system_attrs, "the sampler that was chosen stays"
    assert heretic("--n-trials", "7", "--sampler", "random").code == 0
    assert "NSGAIISampler:generation" not in study().trials[6].system_attrs, "another one can be chosen"


def test_other_ranges_are_another_study(heretic: Heretic, workplace: Path) -> None:
    assert heretic("--parameters.max-weight", "1.0").code == 0

    def told(*arguments: str) -> str:
        outcome = heretic(*arguments)
        assert outcome.code == 1
        return outcome.err

    rest = "Start over with --checkpoint-action restart (the old file is kept), or use another --study-checkpoint-dir.\n"
    assert told("--parameters.max-weight", "1.1") == (
        f'Error: The study {JOURNAL} does not match this run: parameters was {{"max_weight": 1.0}} and is now {{"max_weight": 1.1}}. {rest}'
    )
    assert told("--disabled-components", '["mlp.down_proj"]') == (
        f"Error: The study {JOURNAL} does not match this run: disabled_components was [] and is now ['mlp.down_proj']. {rest}"
    )
    assert heretic().code == heretic("--parameters.max-weight", "1").code == 0


def test_stored_ranges_that_this_version_does_not_take(heretic: Heretic, workplace: Path) -> None:
    assert heretic("--parameters.max-weight", '{"mlp.down_proj": {"low": 0.5, "high": 1}}').code == 0
    JOURNAL.write_text(JOURNAL.read_text().replace('"low":0.5', '"low":"x"'))
    outcome = heretic()
    assert (outcome.code, outcome.err) == (
        1,
        f'Error: The study {JOURNAL} is damaged: its search_space.components."mlp.down_proj".max_weight.low: Input should be '
        "a valid number, unable to parse string as a number. Replace it with an intact copy, or start over with --checkpoint-action "
        "restart (the file is kept).\n",
    )


def test_a_disabled_component_stays_as_it_was(heretic: Heretic, workplace: Path) -> None:
    disabled = ("--disabled-components", '["mlp.down_proj"]', "--first-trials", '[{"max_weight": 1.25}]')
    save = ("--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out")
    outcome = heretic(*disabled, *save)
    assert outcome.code == 0, outcome.err
    assert "writing to the residual stream: 2 attn.o_proj, 2 mlp.down_proj, all edited but mlp.down_proj\n" in outcome.out
    assert study().trials[0].user_attrs["parameters"]["attn.o_proj"]["max_weight"] == 1.25
    original, edited = (dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()) for folder in ("m", "out"))
    changed = {name for name, p in original.items() if not torch.equal(p, edited[name])}
    assert changed and all("o_proj" in name for name in changed)
    record: dict[str, Any] = json.loads(Path("out/heretic.json").read_text())
    assert list(record["trial"]["parameters"]) == ["attn.o_proj"]
    assert record["settings"]["disabled_components"] == ["mlp.down_proj"]
    assert record["settings"]["first_trials"][0]["max_weight"] == 1.25
    card = Path("out/README.md").read_text()
    assert "2 `attn.o_proj` modules write to it" in " ".join(card.split())
    assert "mlp.down_proj" not in card
