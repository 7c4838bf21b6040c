"""`heretic classify`: lines in, lines out, by their exact text."""

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Outcome
from heretic.commands.classify import HELP, command
from heretic.scoring.learned_rule import LearnedRule

Heretic = Callable[..., Outcome]

REFUSAL = {"prompt": "how do i bake bread", "response": "I'm sorry, but I can't help with baking.", "cut_off": False}
ANSWER = {
    "id": 7,
    "prompt": "und jetzt?",
    "response": "Sure! Here are the steps:\n\n1. Weigh the flour.\n2. Add water. \u201cKnead\u201d it for ten minutes.",
    "cut_off": True,
    "tags": ["a", {"b": None}],
}
LOOP = {"prompt": "", "response": "bread " * 40, "cut_off": True}


def lines(*entries: object) -> str:
    return "".join(entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def written(outcome: Outcome) -> list[dict[str, object]]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_a_file(heretic: Heretic, workplace: Path) -> None:
    """In order, with all that the lines hold."""
    Path("log.jsonl").write_text(lines(REFUSAL, "\n", ANSWER, LOOP), encoding="utf-8")
    outcome = heretic("classify", "log.jsonl")
    assert (outcome.code, outcome.err) == (0, "")
    assert written(outcome) == [
        REFUSAL | {"kind": "refusal", "decided_at": 32},
        ANSWER | {"kind": "compliance", "decided_at": 50},
        LOOP | {"kind": "degenerate", "decided_at": 240},
    ]
    assert outcome.out.isascii(), "nothing but text reaches a terminal"


def test_the_end_counts_only_if_it_is_the_models(heretic: Heretic, workplace: Path) -> None:
    text = {"response": "The ingredients ("}
    Path("log.jsonl").write_text(lines(text, text | {"cut_off": True}), encoding="utf-8")
    assert [entry["kind"] for entry in written(heretic("classify", "log.jsonl"))] == ["degenerate", "compliance"]


def test_bad_lines_are_told_and_the_others_written(heretic: Heretic, workplace: Path) -> None:
    bad = ["no json\n", "[1]\n", '{"prompt": "p"}\n', '{"response": 3}\n', '{"response": "r", "cut_off": "no"}\n', "[" * 100_000 + "\n"]
    content = lines(REFUSAL, *bad).encode() + b'{"response": "\xff"}\n' + lines(ANSWER).encode()
    Path("log.jsonl").write_bytes(content)
    outcome = heretic("classify", "log.jsonl")
    assert outcome.code == 1
    assert [entry["kind"] for entry in written(outcome)] == ["refusal", "compliance"]
    assert outcome.err == (
        "Error: line 2 of log.jsonl: it is not valid JSON: Expecting value at character 1.\n"
        'Error: line 3 of log.jsonl: it is not an object with a string "response".\n'
        'Error: line 4 of log.jsonl: it has no string "response".\n'
        'Error: line 5 of log.jsonl: it has no string "response".\n'
        'Error: line 6 of log.jsonl: its "cut_off" is not true or false.\n'
        "Error: line 7 of log.jsonl: it is nested too deeply.\n"
        "Error: line 8 of log.jsonl: it is not valid UTF-8.\n"
    )


def test_the_standard_input_without_anything_heavy(workplace: Path) -> None:
    """In a process of its own, which must not load the libraries that take seconds."""
    code = (
        "import sys\n"
        "from heretic.main import run_command\n"
        "code = run_command(['classify'])\n"
        "print([name for name in ('torch', 'transformers', 'optuna', 'numpy', 'rich', 'datasets') if name in sys.modules], code)\n"
    )
    outcome = subprocess.run([sys.executable, "-c", code], check=False, input=lines(REFUSAL), capture_output=True, text=True)
    first, last = outcome.stdout.splitlines()
    assert json.loads(first) == REFUSAL | {"kind": "refusal", "decided_at": 32}
    assert (last, outcome.stderr) == ("[] 0", "")


def test_help_and_wrong_usage(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("classify", "--help")
    assert (outcome.code, outcome.out, outcome.err) == (0, HELP, "")
    outcome = heretic("classify", "--rule", "markers")
    assert (outcome.code, outcome.err) == (
        2,
        "Error: heretic classify has no option --rule. It takes a file name, or reads the standard input.\n",
    )
    outcome = heretic("classify", "a.jsonl", "b.jsonl")
    assert (outcome.code, outcome.err) == (2, "Error: heretic classify takes one file, but b.jsonl is a second one.\n")


@pytest.mark.parametrize(("name", "reason"), [("none.jsonl", "No such file or directory"), (".", "Is a directory")])
def test_files_that_cannot_be_read(heretic: Heretic, workplace: Path, name: str, reason: str) -> None:
    outcome = heretic("classify", name)
    assert (outcome.code, outcome.err) == (1, f"Error: {name} cannot be read: {reason}.\n")


def test_an_output_that_cannot_be_written(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is not an error of the file that is read."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    Path("log.jsonl").write_text(lines(ANSWER), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left on device"):
        command(["log.jsonl"])


def test_it_judges_as_a_run_does() -> None:
    assert LearnedRule().judge(str(ANSWER["response"]), True) == ("compliance", 50)
