"""`heretic classify [FILE.jsonl]`: classifies responses from any source by the learned rule.

Each line of the file (or of the standard input) is an object with `prompt` (not used), `response` and, if the response ends only
because generation was stopped, `"cut_off": true`. It is written with `kind` and `decided_at` added. Nothing heavy is imported, so that
it starts at once.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ..config import CHAIN_OF_THOUGHT_SKIPS
from ..errors import HereticError, UsageError
from ..scoring.learned_rule import LearnedRule
from ..utils import JsonObject

HELP = """Usage: heretic classify [FILE.jsonl]

Classifies each response by the learned rule (see docs/scoring.md). Reads the standard input if no file is given.

Each line is a JSON object: "prompt" (not used), "response" and "cut_off" (true if the response ends only because generation was
stopped; default: false). The lines are written to the standard output in the same order, unchanged except for two added keys:

  "kind"        refusal, compliance or degenerate (empty, repetitive or cut short)
  "decided_at"  number of characters of the response after which the verdict was final; most are decided by their beginning

An invalid line is reported with its number on the standard error stream. The other lines are still written, and the exit code is 1.
"""


def command(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code; raises `HereticError`."""
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    options = [argument for argument in arguments if argument.startswith("-") and argument not in ("-", "--debug")]
    names = [argument for argument in arguments if argument not in options and argument != "--debug"]
    if options:
        raise UsageError(f"heretic classify has no option {options[0]}. It takes a file name, or reads the standard input.")
    if len(names) > 1:
        raise UsageError(f"heretic classify takes one file, but {names[1]} is a second one.")
    name = names[0] if names else "-"
    return classify(_lines(name), "the standard input" if name == "-" else name)


def _lines(name: str) -> Iterator[bytes]:
    """The lines of a file, or of the standard input (`-`)."""
    try:
        if name == "-":
            yield from sys.stdin.buffer
            return
        with Path(name).expanduser().open("rb") as file:
            yield from file
    except OSError as error:
        raise HereticError(f"{name} cannot be read: {error.strerror}.") from error


def classify(lines: Iterable[bytes], name: str, out: TextIO | None = None) -> int:
    """Classify each of the `lines` (bytes) and write it to `out` (default: standard output). Returns 1 if a line was invalid, else 0."""
    rule = LearnedRule((), CHAIN_OF_THOUGHT_SKIPS)
    out = sys.stdout if out is None else out
    code = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _entry(line)
        except ValueError as error:
            print(f"Error: line {number} of {name}: {error}", file=sys.stderr)
            code = 1
            continue
        verdict = rule.judge(entry["response"], entry.get("cut_off", False))
        out.write(json.dumps(entry | {"kind": verdict.kind, "decided_at": verdict.decided_at}) + "\n")
    return code


def _entry(line: bytes) -> JsonObject:
    """The object of a line. Raises `ValueError` saying what is wrong with it."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError("it is not valid UTF-8." if isinstance(error, UnicodeDecodeError) else "it is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error.msg} at character {error.pos + 1}.") from error
    if not isinstance(entry, dict):
        raise ValueError('it is not an object with a string "response".')
    if not isinstance(entry.get("response"), str):
        raise ValueError('it has no string "response".')
    if not isinstance(entry.get("cut_off", False), bool):
        raise ValueError('its "cut_off" is not true or false.')
    return entry
