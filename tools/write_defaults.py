"""Writes the files that are generated from the settings: `config.default.toml` and the text of `heretic --help`.

Run it after a change in `src/heretic/config.py`; a test compares both files with what it would write.
"""

import json
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin

from heretic.config import Settings, default_of
from heretic.parameters import Parameters, quoted
from heretic.specifications import PromptSpecification

ROOT = Path(__file__).parents[1]
WIDTH = 100

TOML_HEADER = """\
# Every setting of heretic with its default. Copy what you change to config.toml in the working directory, or give another
# file with --config PATH. The same settings are flags (--n-trials 100) and environment variables (HERETIC_N_TRIALS=100).
# Settings without a default are commented out.
"""

PARAMETERS_FOOTER = """\
# Other ways to write them:
#   max_weight = 1.0                                  a constant, not optimized
#   max_weight = { low = 0.1, high = 1.5, log = true }
#   max_weight = { "mlp.down_proj" = 0.5 }            one component; the others keep the default
#   [parameters.max_weight]                           the same as a separate table
#   "attn.o_proj" = { low = 1.0, high = 1.5 }
#   "mlp.down_proj" = 0.5
"""

HELP_HEADER = """\
Usage: heretic [MODEL] [--config PATH] [OPTIONS]
       heretic --demo
       heretic compare A B [C...] [OPTIONS]
       heretic classify [FILE.jsonl]
       heretic worker --study-storage URL [--workers auto|N]
       heretic --export-from RESULT --save-directory FOLDER
       heretic --reproduce RESULT

Removes refusals from a transformer language model by directional ablation, without training, and keeps
the rest of the model as it was. MODEL is a hub id or a local folder. `heretic compare` scores saved
models, adapters and studies (their .jsonl files; FILE:N for trial N of the front) on the same prompts.
`heretic classify` tells which responses in a file are refusals.

Settings come from the command line, the environment (HERETIC_N_TRIALS=100), .env, and a TOML file
(config.toml in the working directory, or --config PATH), in this order of precedence. Lists and tables
are written as JSON. Fields of prompt sources are separate options: --good-prompts.dataset prompts.txt
Switches are turned off by --no-..., such as --no-stop-dominated-trials.

A RESULT is a folder that heretic saved, its heretic.json, or the URL of one:
  --export-from RESULT
      Rebuild the saved model from its original in --save-directory, without prompts or search.
      --model names the original if it has moved; --overwrite and --trust-remote-code as below.
  --reproduce RESULT
      List what has changed since it was saved, rebuild it and compare the files.
  --reproduce-search RESULT
      Run the study again with the stored settings and seed, and compare the trial.

Options:
  --config PATH
      TOML file with settings.
  -h, --help
      Show this text.
  --version
      Show the program's version.
"""


def toml_value(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{quoted(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        inline = "[" + ", ".join(toml_value(item) for item in value) + "]"
        if len(inline) <= WIDTH:
            return inline
        return "[\n" + "".join(textwrap.indent(toml_value(item), "    ") + ",\n" for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def config_default_toml() -> str:
    """The text of `config.default.toml`."""
    parts = [TOML_HEADER]
    tables = []
    for name, field in Settings.model_fields.items():
        comment = "".join(f"# {line}\n" for line in textwrap.wrap(field.description or "", WIDTH))
        default = default_of(name)
        if isinstance(default, Parameters):
            tables.append(f"{comment}[{name}]\n{parameters_toml(default)}{PARAMETERS_FOOTER}")
        elif isinstance(default, PromptSpecification):
            values = default.model_dump(exclude_defaults=True)
            tables.append(f"{comment}[{name}]\n" + "".join(f"{k} = {toml_value(v)}\n" for k, v in values.items()))
        elif default is None:
            parts.append(f"{comment}# {name} =\n")
        else:
            parts.append(f"{comment}{name} = {toml_value(default)}\n")
    options = "".join(f"#   {name}: {field.description}\n" for name, field in PromptSpecification.model_fields.items())
    return "\n".join([*parts, f"# Fields of each prompt source:\n{options}", *tables])


def parameters_toml(parameters: Parameters) -> str:
    """The lines of the table `parameters`, each with its comment."""
    lines = []
    for name, value in parameters.as_table().items():
        lines += [f"# {line}" for line in textwrap.wrap(Parameters.model_fields[name].description or "", WIDTH)]
        lines.append(f"{name} = {toml_value(value)}")
    return "".join(f"{line}\n" for line in lines)


def kind_of(name: str) -> str:
    """How a setting's value is written on the command line."""
    field = Settings.model_fields[name]
    annotations = [a for a in (get_args(field.annotation) or (field.annotation,)) if a is not type(None)]
    words = [word for word in annotations if isinstance(word, str)]
    words += [word for a in annotations for word in get_args(a) if isinstance(word, str)]
    if field.annotation is Parameters:
        return "JSON"
    if field.annotation is bool or bool in annotations:
        return ""
    if words and get_origin(field.annotation) is not list:
        return "|".join([*words, *("N" for a in annotations if int in get_args(a))])
    if int in annotations and str not in annotations:
        return "N"
    if float in annotations:
        return "X"
    return "JSON" if get_origin(field.annotation) in (list, dict) else "TEXT"


def shown_default(default: Any) -> str:
    """A default in brackets, if it fits in a line."""
    if default in (None, False, [], {}) or isinstance(default, Parameters):
        return ""
    if isinstance(default, PromptSpecification):
        return f" [{default.dataset}, {default.split}, {default.column}]"
    text = toml_value(default)
    return "" if "\n" in text else f" [{text}]"


def help_text() -> str:
    """The text of `heretic --help`."""
    lines = [HELP_HEADER]
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        default = default_of(name)
        kind = ".dataset TEXT" if isinstance(default, PromptSpecification) else f" {kind_of(name)}"
        described = (field.description or "") + shown_default(default)
        lines.append(f"  {flag}{kind}".rstrip() + "\n")
        lines.append(textwrap.fill(described, WIDTH, initial_indent="      ", subsequent_indent="      ") + "\n")
    text = (
        f"The fields of a prompt source are {', '.join(PromptSpecification.model_fields)}. The fields of --parameters are "
        f'options too, such as --parameters.max-weight 1.0 or \'{{"low": 0.5, "high": 1.0}}\': {", ".join(Parameters.model_fields)}. '
        "config.default.toml in the repository shows all defaults."
    )
    lines.append("\n" + textwrap.fill(text, WIDTH) + "\n")
    return "".join(lines)


FILES = {
    ROOT / "config.default.toml": config_default_toml,
    ROOT / "src/heretic/help.txt": help_text,
}

if __name__ == "__main__":
    for path, make in FILES.items():
        path.write_text(make(), encoding="utf-8")
