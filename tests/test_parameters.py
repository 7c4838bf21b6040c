"""The `parameters` table and its relatives as a user writes them, from every source, and the exact line for each way to get them wrong."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from heretic.config import Settings
from heretic.errors import UsageError
from heretic.parameters import FirstTrial, FractionRange, Parameters, Range
from heretic.settings_sources import load_settings

# The two ways to write them in the discussion of the change (inline tables, and a table per component).
INLINE = """\
[parameters]
direction_scope = ["global", "per layer"]
direction_index = { low = 0.4, high = 0.9 }
max_weight = { low = 0.8, high = 1.5, log = true }
max_weight_position = { low = 0.6, high = 1.0 }
min_weight = 0.5
min_weight_distance = { "attn.o_proj" = { low = 0.1, high = 0.6 }, "mlp.down_proj" = 0.3 }
"""
TABLES = """\
[parameters]
direction_scope = [
    "global",
    "per layer",
]
min_weight = 0.5

[parameters.direction_index]
low = 0.4
high = 0.9

[parameters.max_weight]
low = 0.8
high = 1.5
log = true

[parameters.max_weight_position]
low = 0.6
high = 1.0

[parameters.min_weight_distance]
"attn.o_proj" = { low = 0.1, high = 0.6 }
"mlp.down_proj" = 0.3
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parameters(toml: str = "", *arguments: str) -> Parameters:
    Path("config.toml").write_text(toml)
    return load_settings(["m", *arguments]).parameters


def told(toml: str, *arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        parameters(toml, *arguments)
    return str(caught.value)


WRITTEN = Parameters(
    direction_index=FractionRange(low=0.4, high=0.9),
    max_weight=Range(low=0.8, high=1.5, log=True),
    max_weight_position=FractionRange(low=0.6, high=1.0),
    min_weight=0.5,
    min_weight_distance={"attn.o_proj": FractionRange(low=0.1, high=0.6), "mlp.down_proj": 0.3},
)


def test_inline_tables_load() -> None:
    assert parameters(INLINE) == WRITTEN


def test_tables_per_parameter_and_component_load() -> None:
    assert parameters(TABLES) == WRITTEN
    expected = {"mlp.down_proj": Range(low=0.1, high=0.2)}
    assert parameters('[parameters.max_weight."mlp.down_proj"]\nlow = 0.1\nhigh = 0.2\n').max_weight == expected
    assert parameters('[parameters.max_weight]\n"mlp.down_proj".low = 0.1\n"mlp.down_proj".high = 0.2\n').max_weight == expected


def test_what_is_left_out_keeps_its_default() -> None:
    given = parameters('[parameters]\nmax_weight = { "mlp.down_proj" = 0.5 }\nmax_weight_position = { "mlp.down_proj" = "auto" }\n')
    usual = Parameters()
    assert given.choice("max_weight", "mlp.down_proj") == 0.5
    assert given.choice("max_weight", "attn.o_proj") == usual.max_weight == "auto"
    assert given.choice("max_weight_position", "attn.o_proj") == given.choice("max_weight_position", "mlp.down_proj") == "auto"
    assert given.choice("min_weight_distance", "attn.o_proj") == usual.min_weight_distance == "auto"
    assert given.choice("min_weight", "attn.o_proj") == Range(low=0.0, high=1.0)
    assert parameters('[parameters]\ndirection_scope = "per layer"\n') == Parameters(direction_scope=["per layer"])


def test_every_source_gives_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERETIC_PARAMETERS__MAX_WEIGHT_POSITION", "0.75")
    monkeypatch.setenv("HERETIC_PARAMETERS__MIN_WEIGHT__LOW", "0.5")
    monkeypatch.setenv("HERETIC_PARAMETERS__DIRECTION_INDEX", '{"low": 0.2, "high": 0.3}')
    Path(".env").write_text('HERETIC_PARAMETERS__DIRECTION_SCOPE=["global"]\n')
    toml = "[parameters]\nmin_weight = { low = 0.1, high = 0.6 }\nmax_weight = { low = 0.1, high = 0.6 }\nmin_weight_distance = 0.1\n"
    given = parameters(toml, "--parameters.max-weight", '{"mlp.down_proj": 1}', "--parameters.min-weight-distance", "0.2")
    assert given == Parameters(
        direction_scope=["global"],
        direction_index=FractionRange(low=0.2, high=0.3),
        max_weight={"mlp.down_proj": 1.0},  # a table per component takes the place of a range
        max_weight_position=0.75,
        min_weight=Range(low=0.5, high=0.6),  # ranges are put together
        min_weight_distance=0.2,
    )


def test_json_for_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parameters("", "--parameters", '{"max_weight": 1}') == Parameters(max_weight=1.0)
    monkeypatch.setenv("HERETIC_PARAMETERS", '{"max_weight": {"low": 0, "high": 2}}')
    assert parameters() == Parameters(max_weight=Range(low=0.0, high=2.0))


ONE_OF = "Input should be a number or a range such as {low = 0.5, high = 1.0} (quote component names that contain dots)"
WRONG = {
    'max_weight = { "mlp.down_proj" = { low = "a", high = 1.0 } }': (
        'Setting parameters.max_weight."mlp.down_proj".low (in config.toml): Input should be a valid number, unable to parse string as a '
        "number, got 'a'."
    ),
    '[parameters.max_weight]\n"mlp.down_proj".low = 0.3': (
        "Setting parameters.max_weight.\"mlp.down_proj\".high: Field required, got {'low': 0.3}."
    ),
    'max_weight_position = { "mlp.down_proj" = { low = 0.1, high = 1.2 } }': (
        'Setting parameters.max_weight_position."mlp.down_proj".high (in config.toml): Input should be less than or equal to 1, got 1.2.'
    ),
    'min_weight = { "mlp.down_proj" = { low = 0.3, high = 0.2 } }': (
        'Setting parameters.min_weight."mlp.down_proj" (in config.toml): low (0.3) is larger than high (0.2), '
        "got {'low': 0.3, 'high': 0.2}."
    ),
    'max_weight = { "mlp.down_proj" = "much" }': (
        'Setting parameters.max_weight."mlp.down_proj" (in config.toml): Input should be a valid number, unable to parse string as a '
        "number, got 'much'."
    ),
    "max_weight = { low = 0, high = 1, log = true }": (
        "Setting parameters.max_weight (in config.toml): log needs a low above 0 (it is 0), got {'low': 0, 'high': 1, 'log': True}."
    ),
    "max_weight = { low = 0.5, hihg = 1 }": (
        "Setting parameters.max_weight.high: Field required, got {'low': 0.5, 'hihg': 1}.\n"
        "Unknown setting parameters.max_weight.hihg (in config.toml) (did you mean high?)."
    ),
    "[parameters.max_weight]\nmlp.down_proj = 0.3": (
        f"Setting parameters.max_weight.mlp (in config.toml): {ONE_OF}, got {{'down_proj': 0.3}}."
    ),
    'direction_index = { "mlp.down_proj" = 0.5 }': (
        f"Setting parameters.direction_index (in config.toml): {ONE_OF}, got {{'mlp.down_proj': 0.5}}."
    ),
    'min_weight = "auto"': f"Setting parameters.min_weight (in config.toml): {ONE_OF}, got 'auto'.",
    'max_weight = { "mlp.down_proj" = { low = "auto", high = 1 } }': (
        'Setting parameters.max_weight."mlp.down_proj".low (in config.toml): Input should be a valid number, unable to parse string as a '
        "number, got 'auto'."
    ),
    "max_weight = {}": (
        "Setting parameters.max_weight (in config.toml): Dictionary should have at least 1 item after validation, not 0, got {}."
    ),
    "max_weight = [1.0]": "Setting parameters.max_weight (in config.toml): Input should be a valid number, got [1.0].",
    "max_weight = nan": "Setting parameters.max_weight (in config.toml): Input should be a finite number, got nan.",
    "min_weight_distance = 1.5": (
        "Setting parameters.min_weight_distance (in config.toml): Input should be less than or equal to 1, got 1.5."
    ),
    "max_wieght = 1.0": "Unknown setting parameters.max_wieght (in config.toml) (did you mean max_weight?).",
    'direction_scope = ["globl"]': (
        "Setting parameters.direction_scope.0 (in config.toml): Input should be 'global' or 'per layer', got 'globl'."
    ),
    "direction_scope = []": (
        "Setting parameters.direction_scope (in config.toml): Value should have at least 1 item after validation, not 0, got []."
    ),
}


@pytest.mark.parametrize("written", WRONG)
def test_what_is_wrong_is_located_as_it_was_written(written: str) -> None:
    assert told(written if written.startswith("[") else f"[parameters]\n{written}\n") == WRONG[written]


def test_wrong_on_the_command_line_and_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told("", "--parameters.max-weight", '{"mlp.down_proj": {"low": "x", "high": 1}}') == (
        'Setting parameters.max_weight."mlp.down_proj".low (on the command line): Input should be a valid number, unable to parse string '
        "as a number, got 'x'."
    )
    assert told("", "--parameters.max-wieght", "1") == (
        "Unknown option --parameters.max-wieght (did you mean --parameters.max-weight?). heretic --help lists all options."
    )
    example = 'such as {"direction_scope": ["global"], "max_weight": 1.0, "min_weight": {"low": 0.5, "high": 1.0}}.'
    cannot = f"cannot be read: lists and tables are written as JSON, {example}"
    assert told("", "--parameters", "narrow") == f"Setting parameters (on the command line) {cannot}"
    assert told("parameters = 5") == (
        "Setting parameters (in config.toml): Input should be a valid dictionary or instance of Parameters, got 5."
    )
    monkeypatch.setenv("HERETIC_PARAMETERS__MAX_WEIGHT__LOW", "-")
    monkeypatch.setenv("HERETIC_PARAMETERS__MAX_WEIGHT__HIGH", "1")
    assert told("") == (
        "Setting parameters.max_weight.low (in the environment): Input should be a valid number, unable to parse string as a number, "
        "got '-'."
    )


def test_first_trials_and_their_errors() -> None:
    Path("config.toml").write_text(
        '[[first_trials]]\ndirection_scope = "global"\ndirection_index = 0.5\nmax_weight = { "mlp.down_proj" = 0.9 }\n'
        "[[first_trials]]\nmax_weight = 1\n"
    )
    expected = [FirstTrial(direction_scope="global", direction_index=0.5, max_weight={"mlp.down_proj": 0.9}), FirstTrial(max_weight=1.0)]
    assert load_settings(["m"]).first_trials == expected
    assert load_settings(["m", "--first-trials", '[{"max_weight": 1}]']).first_trials == expected[1:]
    assert told(
        '[[first_trials]]\nmax_weight = { "mlp.down_proj" = "x" }\n[[first_trials]]\nmax_wieght = 1\nmin_weight_distance = 2\n'
    ) == (
        'Setting first_trials.0.max_weight."mlp.down_proj" (in config.toml): Input should be a valid number, unable to parse string as a '
        "number, got 'x'.\n"
        "Setting first_trials.1.min_weight_distance (in config.toml): Input should be less than or equal to 1, got 2.\n"
        "Unknown setting first_trials.1.max_wieght (in config.toml) (did you mean max_weight?)."
    )
    assert told("[[first_trials]]\nmax_weight = { low = 0.5, high = 1.0 }\n") == (
        "Setting first_trials.0.max_weight (in config.toml): Input should be a valid number, got {'low': 0.5, 'high': 1.0}."
    )


def test_a_sampler_that_does_not_exist() -> None:
    assert told('sampler = "cmaes"') == (
        "Setting sampler (in config.toml): Input should be 'tpe', 'gp', 'nsgaii' or 'random', got 'cmaes'."
    )


@pytest.mark.parametrize("toml", [INLINE, '[parameters]\nmax_weight_position = { "mlp.down_proj" = "auto" }\n', ""])
def test_settings_survive_being_stored(toml: str) -> None:
    settings = Settings.model_validate({"model": "m", **tomllib.loads(toml)})
    stored: dict[str, Any] = settings.model_dump(mode="json")
    assert Settings.model_validate(stored) == settings
    assert Parameters.model_validate(settings.parameters.as_table()) == settings.parameters
