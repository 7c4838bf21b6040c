"""Reads settings from all sources, and reports invalid ones.

In order of precedence: command line, environment (`HERETIC_`), `.env`, the TOML file.
"""

import argparse
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from .config import DEMO_MODEL, Settings, default_value, is_true
from .demo import PROMPTS as DEMO_PROMPTS
from .errors import UsageError, did_you_mean
from .parameters import TAGS, FirstTrial, Parameters, Range, kind, quoted
from .specifications import PromptSpecification, ScorerSpecification
from .trust import Ask, require_consent
from .utils import JsonObject

ENV_PREFIX = "HERETIC_"
DEFAULT_CONFIG_FILE = "config.toml"

# Settings besides prompt sources that take a table, whose fields can also be set in the environment.
_TABLES = ("device_map", "max_memory", "parameters", "final_good_prompts", "final_bad_prompts")

# Examples in error messages for settings whose default is not a useful example.
_EXAMPLES: JsonObject = {
    "max_memory": {"0": "20GB"},
    "device_map": {"": "cpu"},
    "parameters": {"direction_scope": ["global"], "max_weight": 1.0, "min_weight": {"low": 0.5, "high": 1.0}},
    "first_trials": [{"direction_scope": "per layer", "max_weight": 1.0}],
    "disabled_components": ["mlp.down_proj"],
}

_NAME_IN_ERROR = re.compile(r'for (?:field ")?(\w+)')


class _CommandSettings(Settings, BaseSettings):
    """`Settings` filled from the command line, the environment, `.env` and a TOML file."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", env_file=".env", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: object, **__: object
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load_settings` reads the sources itself, to know the source of an invalid value


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError`."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized arguments") and unknown.startswith("--"):
            flag = unknown.split("=")[0]
            flags = [option for option in self._option_string_actions if option.startswith("--")]
            raise UsageError(f"Unknown option {flag}{did_you_mean(flag, flags)}. {self.prog} --help lists all options.")
        raise UsageError(f"Wrong usage: {message}. {self.prog} --help lists all options.")


@cache
def command_parser(n_names: str = "?") -> tuple[argparse.ArgumentParser, CliSettingsSource[Any]]:
    """The command line's parser, and the settings source bound to it, made once; `n_names` as argparse's `nargs`."""
    parser = Parser(prog="heretic", allow_abbrev=False, add_help=False)
    parser.add_argument("model_argument", nargs=n_names, metavar="model")
    parser.add_argument("--config")
    source: CliSettingsSource[Any] = CliSettingsSource(
        _CommandSettings,
        root_parser=parser,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,  # so that flags without a default work as flags
        cli_prog_name="heretic",
    )
    return parser, source


@dataclass(frozen=True)
class Source:
    """Settings as plain data, and `where` they were given; `name` of the file that they were read from.

    `is_own`: the user typed them, or named the file. Settings from other sources may not let code run.
    """

    where: str
    values: JsonObject
    name: str = ""
    is_own: bool = True


@dataclass(frozen=True)
class LoadedSettings:
    """The settings of a command, the models that it names, and the configuration files that were read."""

    settings: Settings
    names: tuple[str, ...]
    files: tuple[str, ...]


def load_settings(arguments: Sequence[str] | None = None, stored: JsonObject | None = None, ask: Ask | None = None) -> Settings:
    """The settings of `read_settings`, without names and files."""
    return read_settings(arguments, stored, ask).settings


def read_settings(arguments: Sequence[str] | None = None, stored: JsonObject | None = None, ask: Ask | None = None) -> LoadedSettings:
    """Settings from the command line `arguments` (default: this process's), the environment, `.env` and a TOML file.

    If `stored` settings of a record are given, only those and the command line are used.
    `model_fields_set` of the result contains the settings that were given. Raises `UsageError`, which names the setting, its source and,
    for an unknown name, the closest known one. Code named by a file in the working directory, or by a record, runs only if the user agrees
    when asked; without `ask` it is an error.
    """
    parser, cli_source = command_parser()
    parsed = vars(parser.parse_args(list(sys.argv[1:] if arguments is None else arguments)))
    config_path, positional = parsed.pop("config"), parsed.pop("model_argument")
    if positional is not None:
        if parsed.get("model") not in (None, positional):
            raise UsageError(f"Two models are given, {positional!r} and --model {parsed['model']!r}; use one.")
        parsed["model"] = positional
    command_line = _command_line(parsed, cli_source)
    if stored is None:
        return _given(_all_sources(command_line, config_path), (), ask)
    return _given([command_line, Source("in the record", stored, name="The record", is_own=False)], (), ask)


def load_settings_of_names(arguments: Sequence[str], ask: Ask | None = None) -> LoadedSettings:
    """Settings as `read_settings` reads them, for any number of models; the first one is `model`, except with `--demo`."""
    parser, cli_source = command_parser("*")
    parsed = vars(parser.parse_intermixed_args(list(arguments)))
    config_path, names = parsed.pop("config"), parsed.pop("model_argument")
    if parsed.get("model") is not None:
        raise UsageError("--model is not an option here: give models and studies as positional arguments.")
    if names and not is_true(parsed.get("demo")):
        parsed["model"] = names[0]
    return _given(_all_sources(_command_line(parsed, cli_source), config_path), names, ask)


def _command_line(parsed: JsonObject, cli_source: CliSettingsSource[Any]) -> Source:
    given = {key: value for key, value in parsed.items() if value is not None}
    if "refusal_markers" in given:  # text, whose commas separate nothing, unlike those of names
        given["refusal_markers"] = [text if text.lstrip().startswith("[") else json.dumps([text]) for text in given["refusal_markers"]]
    with _reading("on the command line"):
        return Source("on the command line", cli_source(parsed_args=given)())


def _all_sources(command_line: Source, config_path: str | None) -> list[Source]:
    """All sources of a command's settings, in order of precedence."""
    with _reading("in the environment"):
        environment = EnvSettingsSource(_CommandSettings)() | _unknown_environment_settings()
    with _reading("in .env"):
        env_file = DotEnvSettingsSource(_CommandSettings, dotenv_filtering="match_prefix")()
    sources = [command_line, Source("in the environment", environment)]
    if env_file:
        sources.append(Source("in .env", env_file, name=".env", is_own=False))
    return sources + _toml_source(config_path)


def _given(sources: Sequence[Source], names: Sequence[str], ask: Ask | None) -> LoadedSettings:
    """The settings merged from sources in order of precedence."""
    try:
        settings = Settings.model_validate(_merged(sources))
    except ValidationError as error:
        raise UsageError(_describe(error, {source.where: source.values for source in sources})) from error
    found = [source.name for source in sources if not source.is_own]
    named = f" or --config {DEFAULT_CONFIG_FILE}" if DEFAULT_CONFIG_FILE in found else ""
    require_consent(" and ".join(found), settings, _merged([source for source in sources if source.is_own]), ask, named)
    return LoadedSettings(settings, tuple(names), tuple(source.name for source in reversed(sources) if source.name))


def _merged(sources: Sequence[Source]) -> JsonObject:
    """Merge settings from sources in order of precedence."""
    merged: JsonObject = {}
    all_values = [source.values for source in sources]
    says_demo = next((values for values in all_values if "demo" in values), {})
    for values in reversed(all_values):
        if values is says_demo and is_true(values["demo"]):  # its model and prompts override those in sources of lower precedence
            merged |= {"model": DEMO_MODEL, **DEMO_PROMPTS}
        merged = _overlay(merged, values)
    return merged


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"Settings {where} cannot be read: it is not UTF-8 text.") from error
    except ValueError as error:  # includes SettingsError of pydantic-settings
        name = _NAME_IN_ERROR.search(str(error))
        if name is None:
            raise UsageError(f"Settings {where} cannot be read: {error}.") from error
        raise UsageError(
            f"Setting {name[1]} ({where}) cannot be read: lists and tables are written as JSON, "
            f"such as {json.dumps(_example(name[1]), ensure_ascii=False)}."
        ) from error


def _example(name: str) -> object:
    if name in _EXAMPLES:
        return _EXAMPLES[name]
    value = default_value(name)
    return value[:2] if isinstance(value, list) else value


def _overlay(below: JsonObject, above: JsonObject) -> JsonObject:
    result = dict(below)
    for key, value in above.items():
        # A range and a table per component cannot be merged: the source of higher precedence replaces the other one.
        both_tables = isinstance(value, dict) and isinstance(result.get(key), dict) and kind(value) == kind(result[key])
        result[key] = _overlay(result[key], value) if both_tables else value
    return result


def _toml_source(config_path: str | None) -> list[Source]:
    path = Path(config_path or DEFAULT_CONFIG_FILE)
    if config_path is None and not path.is_file():
        return []
    try:
        content = path.read_bytes()
        return [Source(f"in {path}", tomllib.loads(content.decode()), name=str(path), is_own=config_path is not None)]
    except OSError as error:
        raise UsageError(f"The configuration file {path} cannot be read: {error.strerror}. Check --config.") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(f"The configuration file {path} is not UTF-8 text (line {line}).") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"The configuration file {path} is not valid TOML: {error}.") from error


def _unknown_environment_settings() -> dict[str, str]:
    """Variables with our prefix that are not settings, so that validation reports them."""
    names = {
        variable[len(ENV_PREFIX) :].lower(): value for variable, value in os.environ.items() if variable.upper().startswith(ENV_PREFIX)
    }
    return {name: value for name, value in names.items() if not _is_known(*name.split("__"))}


def _is_known(name: str, *parts: str) -> bool:
    """Whether a name (possibly with parts) is a setting; parts of tables are checked by validation."""
    return name in Settings.model_fields and (not parts or isinstance(default_value(name), dict) or name in _TABLES)


def _describe(error: ValidationError, sources: Mapping[str, JsonObject]) -> str:
    """One line for each distinct problem: the setting as the user wrote it, its source, what is wrong, what to do."""
    lines: list[str] = []
    for problem in error.errors():
        if problem["type"] == "default_factory_not_called":  # caused by another problem
            continue
        location = [part for part in problem["loc"] if not _is_type_tag(part)]
        name = as_written(location)
        origin = next((f" ({source})" for source, values in sources.items() if location and _holds(values, location)), "")
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            line = f"Unknown setting {name}{origin}{did_you_mean(str(location[-1]), _known_beside(location))}."
        elif location == ["model"] and problem["type"] == "missing":
            line = "No model is given. Try: heretic <model-id or folder>, or heretic --demo"
        elif not location:
            line = f"{message}."
        else:
            line = f"Setting {name}{origin}: {message}, got {problem['input']!r}."
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def _known_beside(location: Sequence[int | str]) -> list[str]:
    """The valid names at a location where an unknown one was found."""
    tables: dict[tuple[bool, int], type[BaseModel]] = {(False, 1): Settings, (True, 2): Parameters, (True, 3): Range, (True, 4): Range}
    if location[0] == "first_trials":
        return list(FirstTrial.model_fields)
    if location[0] == "scorers" and len(location) > 1:
        return list(ScorerSpecification.model_fields)
    table = tables.get((location[0] == "parameters", len(location)), PromptSpecification)
    return list(table.model_fields)


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Where the first problem is, as the user would write it, and what is wrong."""
    problem = error.errors()[0]
    return as_written(problem["loc"]), problem["msg"].removeprefix("Value error, ")


def as_written(location: Sequence[int | str]) -> str:
    """The location of an error as the user would write it: `parameters.max_weight."mlp.down_proj".low`."""
    return ".".join(quoted(part) if isinstance(part, str) else str(part) for part in location if not _is_type_tag(part))


def _holds(values: object, location: Sequence[int | str]) -> bool:
    """Whether a source has a value at a location, as far as that leads through tables."""
    for part in location:
        if not isinstance(values, dict):
            return True
        if part not in values:
            return False
        values = values[part]
    return True


def _is_type_tag(part: int | str) -> bool:
    """Whether pydantic added this part of a location to distinguish the branches of a union."""
    return isinstance(part, str) and (part in ("str", "int", "float", "constrained-int", *TAGS) or "[" in part)
