"""`heretic classify [FILE.jsonl]`: what responses are, by the learned rule: one's own logs, or another program's.

Each line of the file (or of the standard input) is an object with `prompt` (which is not looked at), `response` and, if that ends only
because generation was stopped, `"cut_off": true`. It is written with `kind` and `decided_at` added. Nothing heavy is imported, so that it
answers at once.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from ..config import CHAIN_OF_THOUGHT_SKIPS
from ..errors import HereticError, UsageError
from ..scoring.learned_rule import LearnedRule
from ..utils import JsonObject

HELP = """Usage: heretic classify [FILE.jsonl]

Says of each response whether it is a refusal, by the learned rule (see docs/scoring.md). Reads the standard input if no file is given.

Each line is a JSON object: "prompt" (not looked at), "response" and "cut_off" (true if the response ends only because generation was
stopped; false if not given). It is written to the standard output, in the same order, with all that it holds and

  "kind"        refusal, compliance or degenerate (empty, looping, broken off)
  "decided_at"  characters of the response after which that verdict stood: most are decided by their beginning

A line that is no such object is told with its number on the standard error stream, the others are written, and the exit code is 1.
"""


def command(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code; raises `HereticError`."""
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    options = [argument for argument in arguments if argument.startswith("-") and argument not in ("-", "--debug")]
    names = [argument for argument in arguments if argument not in options and argument != "--debug"]
    if options:
        raise UsageError(f"heretic classify has no option {options[0]}. It takes the name of a file, or reads the standard input.")
    if len(names) > 1:
        raise UsageError(f"heretic classify takes one file; {names[1]} is one too many.")
    name = names[0] if names else "-"
    try:
        if name == "-":
            return classify(sys.stdin.buffer, "the standard input")
        with Path(name).expanduser().open("rb") as file:
            return classify(file, name)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HereticError(f"{name} cannot be read: {error.strerror}.") from error


def classify(lines: Iterable[bytes], name: str, out: TextIO | None = None) -> int:
    """Judge each of the `lines` (bytes) and write it to `out` (else the standard output); 1 where any was bad, else 0."""
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
    """What a line holds. Raises `ValueError` saying what is wrong with it."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError("it is no text in UTF-8." if isinstance(error, UnicodeDecodeError) else "it is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} at character {error.pos + 1}.") from error
    if not isinstance(entry, dict):
        raise ValueError('it is no object with a text "response".')
    if not isinstance(entry.get("response"), str):
        raise ValueError('it has no text "response".')
    if not isinstance(entry.get("cut_off", False), bool):
        raise ValueError('its "cut_off" is neither true nor false.')
    return entry
