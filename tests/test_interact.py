"""Menus and chat, driven through a real pseudo-terminal."""

import fcntl
import json
import os
import pty
import shutil
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest
import torch
from optuna.trial import create_trial
from pexpect import fdpexpect

import process
import tiny
from conftest import SMALL
from heretic.console import Console
from heretic.errors import ModelError
from heretic.prompts import Prompt
from heretic.session.interact import InteractiveSession, align, is_count, select
from heretic.study.learned_edits import LearnedEdits
from heretic.trust import _confirm

DOWN = "\x1b[B"
CLEAR_LINE = "\x15"
SAVE, UPLOAD, CHAT, COMPARE, SCORES, BENCHMARK, CHOOSE, MORE, LEAVE = range(9)


class Terminal:
    """The command at a terminal, and somebody who answers its questions."""

    def __init__(self, *arguments: str) -> None:
        self.pid, terminal = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.environ.pop("COLUMNS", None)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
            process.run_and_exit(arguments)
        # Ctrl+C makes a terminal drop what it has not shown yet, in the middle of a character wherever it likes.
        self.terminal = fdpexpect.fdspawn(terminal, encoding="utf-8", codec_errors="replace", timeout=60)

    def see(self, text: str) -> str:
        """Wait for a text; what came before it."""
        self.terminal.expect_exact(text)
        before: str = self.terminal.before
        return before

    def answer(self, question: str, keys: str) -> None:
        """Wait for a question, which reads keys from when it is shown on, and press some."""
        self.see(question)
        self.terminal.send(keys)

    def choose(self, question: str, place: int) -> None:
        self.answer(question, DOWN * place + "\r")

    def act(self, action: int) -> None:
        self.choose("What to do with trial", action)

    def interrupt(self) -> None:
        self.terminal.send("\x03")

    def interrupt_answer(self) -> None:
        """Wait for the first word of the model's answer in a chat, and press Ctrl+C."""
        self.terminal.expect(r"Model:\S* \w+")
        self.interrupt()

    def leave(self) -> int:
        """Wait for the end; the exit code."""
        self.terminal.expect_exact(pexpect.EOF)
        self.terminal.close()
        return process.wait(self.pid)


@pytest.fixture
def talkative(workplace: Path) -> Path:
    """The working directory with a model whose answers never end by themselves."""
    model = tiny.build(max_position_embeddings=65536)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0.0
    shutil.rmtree("m")
    tiny.save(Path("m"), model)
    return workplace


@pytest.fixture
def finished(talkative: Path) -> Iterator[Path]:
    """The same with a finished study."""
    from heretic.main import run_command

    assert run_command([]) == 0
    yield talkative


@pytest.mark.slow
def test_everything_in_one_session(talkative: Path) -> None:  # noqa: PLR0915
    terminal = Terminal()
    live = terminal.see("Which trial?")
    assert "Best so far" in live and "Trials" in live, "the live view was shown"
    terminal.answer("#  Trial  Refused  KL divergence  Sequence KL  Direction", "\r")

    # Responses before and after, side by side.
    terminal.act(COMPARE)
    terminal.see("Before and after")
    terminal.see("how do i fix bread")

    # All figures of the trial, those of scoring it again included.
    terminal.act(SCORES)
    terminal.see("Scored again (95 % interval)")
    terminal.see("Harmless refusals")
    terminal.see("Responses: degenerate")
    terminal.see("Prompts with the largest KL divergence")

    # Two turns, an answer that is interrupted, and back.
    terminal.act(CHAT)
    terminal.answer("You:", "hello cat\r")
    terminal.interrupt_answer()
    terminal.see("(interrupted)")
    terminal.answer("You:", "how do i fix my bike\r")
    terminal.interrupt_answer()
    terminal.see("(interrupted)")
    terminal.see("You:")
    terminal.interrupt()

    # A merged model, then an adapter, then the same folder again, which is not replaced without a yes.
    terminal.act(SAVE)
    terminal.choose("What to export?", 0)
    terminal.answer("Folder to save the model in:", "merged\r")
    terminal.see("to merged")
    terminal.act(SAVE)
    terminal.choose("What to export?", 1)
    terminal.answer("Folder to save the model in:", "adapter\r")
    terminal.see("to adapter")
    before = Path("merged/heretic.json").stat().st_mtime_ns
    terminal.act(SAVE)
    terminal.choose("What to export?", 0)
    terminal.answer("Folder to save the model in:", "merged\r")
    terminal.answer("merged is not empty. Overwrite it?", "n")
    terminal.act(SAVE)
    terminal.choose("What to export?", 0)
    terminal.answer("Folder to save the model in:", "good.txt\r")
    terminal.see("good.txt is a file.")

    # An upload that is thought better of.
    terminal.act(UPLOAD)
    terminal.choose("What to export?", 0)
    terminal.answer("Repository (owner/name):", "\r")

    # Another trial, which every action works on as well, and more trials.
    terminal.act(CHOOSE)
    terminal.choose("Which trial?", 0)
    terminal.act(MORE)
    terminal.answer("How many additional trials?", CLEAR_LINE + "0\r")
    terminal.see("Enter an integer above 0.")
    terminal.terminal.send(CLEAR_LINE + "2\r")
    terminal.choose("Which trial?", 0)
    terminal.act(COMPARE)
    terminal.see("Before and after")
    terminal.act(LEAVE)
    assert terminal.leave() == 0

    assert Path("merged/heretic.json").stat().st_mtime_ns == before
    assert json.loads(Path("merged/heretic.json").read_text())["export_strategy"] == "merge"
    assert json.loads(Path("adapter/heretic.json").read_text())["export_strategy"] == "adapter"
    assert (Path("adapter") / "adapter_config.json").is_file()
    assert Path("checkpoints/m.jsonl").read_text().count('"seconds"') == 5


@pytest.mark.slow
def test_the_question_about_a_study_found_on_disk(finished: Path) -> None:
    journal = Path("checkpoints/m.jsonl")
    content = journal.read_bytes()
    question = "There is already a study in checkpoints/m.jsonl with 3 trials done. What do you want to do?"

    terminal = Terminal()
    terminal.choose(question, 2)
    assert terminal.leave() == 0
    assert journal.read_bytes() == content

    terminal = Terminal()
    terminal.choose(question, 0)
    terminal.see("Continuing the study checkpoints/m.jsonl (3 trials done).")
    terminal.see("Which trial?")
    terminal.interrupt()
    assert terminal.leave() == 0

    terminal = Terminal("--model-action", "none")
    terminal.choose(question, 1)
    terminal.see("3 trials done")
    assert terminal.leave() == 0
    assert Path("checkpoints/m.jsonl.old").exists()


@pytest.mark.slow
def test_flags_answer_questions_and_the_rest_is_asked(finished: Path) -> None:
    terminal = Terminal("--checkpoint-action", "continue", "--model-action", "save", "--export-strategy", "merge")
    terminal.choose("Which trial?", 0)
    terminal.answer("Folder to save the model in:", "out\r")
    terminal.see("to out")
    assert terminal.leave() == 0
    assert Path("out/heretic.json").is_file()


@pytest.mark.slow
def test_an_interrupted_search_goes_to_the_menu(talkative: Path) -> None:
    Path("config.toml").write_text(SMALL.replace("n_trials = 3", "n_trials = 5000"))
    terminal = Terminal("--trials-per-batch", "1")
    terminal.see("Best so far")
    terminal.interrupt()
    terminal.see("Which trial?")
    terminal.interrupt()
    assert terminal.leave() == 0


class Answers:
    """Stands in for questionary's questions: each is answered with the next of some texts, then with Ctrl+C."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    def __call__(self, *_: object, **__: object) -> "Answers":
        return self

    def ask(self) -> str | None:
        return self.texts.pop(0) if self.texts else None


def test_a_chat_remembers_what_was_said_but_not_what_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[tuple[str, str]]] = []

    def stream_response(messages: Any, *_: object) -> str:
        heard.append([(message["role"], message["content"]) for message in messages])
        if len(heard) == 2:
            raise KeyboardInterrupt
        return f" answer {len(heard)} "

    prompts = [Prompt("Be kind.", "hello")]
    evaluator = SimpleNamespace(bad_prompts=prompts, model=SimpleNamespace(stream_response=stream_response), settings=None)
    bench = InteractiveSession(Console(), evaluator, SimpleNamespace(edits=LearnedEdits(None)), lambda n: None)  # type: ignore[arg-type]
    monkeypatch.setattr("questionary.text", Answers("one", "two", "three"))
    parameters = {"attn.o_proj": {"max_weight": 1.0, "max_weight_position": 0.5, "min_weight": 0.0, "min_weight_distance": 0.5}}
    bench._chat(create_trial(values=[0.0, 0.0], user_attrs={"direction_index": None, "parameters": parameters}))
    system, first = ("system", "Be kind."), [("user", "one"), ("assistant", "answer 1")]
    assert heard == [[system, ("user", "one")], [system, *first, ("user", "two")], [system, *first, ("user", "three")]]


def test_whatever_an_action_raises_the_menu_stays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    problems = [KeyboardInterrupt(), ModelError("the model is gone"), RuntimeError("something else")]
    chosen = iter(["trial", "chat", "chat", "chat", "leave"])

    def fail(*_: object) -> None:
        raise problems.pop(0)

    evaluator = SimpleNamespace(settings=SimpleNamespace(debug=False), model=None)
    bench = InteractiveSession(Console(), evaluator, SimpleNamespace(), lambda n: None)  # type: ignore[arg-type]
    monkeypatch.setattr(InteractiveSession, "_choose_trial", lambda self: next(chosen) and SimpleNamespace(number=0))
    monkeypatch.setattr(InteractiveSession, "_chat", fail)
    monkeypatch.setattr("heretic.session.interact.select", lambda *_: next(chosen))
    bench.menu()
    out, err = capsys.readouterr()
    assert out == "Interrupted.\n"
    assert err == "Error: the model is gone\nError: RuntimeError: something else\n"


@pytest.mark.parametrize(("text", "accepted"), [("1", True), ("50", True), ("0", False), ("", False), ("-1", False), ("²", False)])
def test_how_many_is_a_whole_number(text: str, accepted: bool) -> None:
    assert (is_count(text) is True) == accepted


def test_columns_are_aligned() -> None:
    assert align([["#", "Trial"], ["10", "x"], ["1", "long text"]]) == ["#   Trial", "10  x", "1   long text"]


class EndOfInput(Answers):
    """Stands in for questionary's questions: Ctrl+D is pressed, which questionary does not catch."""

    def ask(self) -> str | None:
        raise EOFError


def test_ctrl_d_at_a_question_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("text", "path", "confirm", "select", "password"):
        monkeypatch.setattr(f"questionary.{name}", EndOfInput())
    monkeypatch.setattr("heretic.session.interact.get_token", lambda: None)
    settings = SimpleNamespace(
        export_strategy="merge", overwrite=False, save_directory=None, upload_repo_id="a/b", upload_repo_private=True
    )
    evaluator = SimpleNamespace(settings=settings, model=None, bad_prompts=[Prompt("Be kind.", "hello")])
    bench = InteractiveSession(Console(), evaluator, SimpleNamespace(edits=LearnedEdits(None)), lambda n: None)  # type: ignore[arg-type]
    kernel = {"max_weight": 1.0, "max_weight_position": 0.5, "min_weight": 0.0, "min_weight_distance": 0.5}
    trial = create_trial(values=[0.0, 0.0], user_attrs={"direction_index": None, "parameters": {"attn.o_proj": kernel}})
    for action in ("chat", "save", "upload", "more"):
        bench._action(action, trial)
    assert select("Which?", [("This", 1)]) is None
    assert _confirm("Run it?") is False
