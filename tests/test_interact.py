"""Menus and chat, driven through a real pseudo-terminal."""

import fcntl
import json
import os
import pty
import shutil
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
import torch
from pexpect import fdpexpect

import process
import tiny
from conftest import SMALL
from heretic.interact import align

DOWN = "\x1b[B"
CLEAR_LINE = "\x15"
SAVE, UPLOAD, CHAT, COMPARE, CHOOSE, MORE, LEAVE = range(7)


class Terminal:
    """The command at a terminal, and somebody who answers its questions."""

    def __init__(self, *arguments: str) -> None:
        self.pid, terminal = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.environ.pop("COLUMNS", None)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
            process.run_and_exit(arguments)
        self.terminal = fdpexpect.fdspawn(terminal, encoding="utf-8", timeout=60)

    def see(self, text: str) -> str:
        """Wait for a text; what came before it."""
        self.terminal.expect_exact(text)
        before: str = self.terminal.before
        return before

    def answer(self, question: str, keys: str) -> None:
        """Wait for a question, and press keys when it is ready to read them."""
        self.see(question)
        time.sleep(0.3)
        self.terminal.send(keys)

    def choose(self, question: str, place: int) -> None:
        self.answer(question, DOWN * place + "\r")

    def act(self, action: int) -> None:
        self.choose("What to do with trial", action)

    def interrupt(self) -> None:
        self.terminal.send("\x03")

    def leave(self) -> int:
        """Wait for the end; the exit code."""
        self.terminal.expect_exact(pexpect.EOF)
        self.terminal.close()
        return process.wait(self.pid)


@pytest.fixture
def talkative(workplace: Path) -> Path:
    """The working directory with a model whose answers never end by themselves."""
    model = tiny.build()
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


def test_everything_in_one_session(talkative: Path) -> None:  # noqa: PLR0915
    terminal = Terminal()
    live = terminal.see("Which trial?")
    assert "Best so far" in live and "Trials" in live, "the live view was shown"
    terminal.see("#  Trial  Refusals  KL divergence  Direction")
    time.sleep(0.3)
    terminal.terminal.send("\r")

    # Responses before and after, side by side.
    terminal.act(COMPARE)
    terminal.see("Before and after")
    terminal.see("how do i fix bread")

    # Two turns, an answer that is interrupted, and back.
    terminal.act(CHAT)
    terminal.answer("You:", "hello cat\r")
    terminal.see("Model:")
    time.sleep(0.5)
    terminal.interrupt()
    terminal.see("(interrupted)")
    terminal.answer("You:", "how do i fix my bike\r")
    terminal.see("Model:")
    time.sleep(0.5)
    terminal.interrupt()
    terminal.see("(interrupted)")
    terminal.see("You:")
    time.sleep(0.3)
    terminal.interrupt()

    # A merged model, then an adapter, then the same folder again, which is not replaced without a yes.
    terminal.act(SAVE)
    terminal.choose("What to export?", 0)
    terminal.answer("Folder to save to:", "merged\r")
    terminal.see("to merged")
    terminal.act(SAVE)
    terminal.choose("What to export?", 1)
    terminal.answer("Folder to save to:", "adapter\r")
    terminal.see("to adapter")
    before = Path("merged/heretic.json").stat().st_mtime_ns
    terminal.act(SAVE)
    terminal.choose("What to export?", 0)
    terminal.answer("Folder to save to:", "merged\r")
    terminal.answer("merged is not empty. Replace it?", "n")
    terminal.act(SAVE)
    terminal.choose("What to export?", 0)
    terminal.answer("Folder to save to:", "good.txt\r")
    terminal.see("good.txt is a file.")

    # An upload that is thought better of.
    terminal.act(UPLOAD)
    terminal.choose("What to export?", 0)
    terminal.answer("Repository (owner/name):", "\r")

    # Another trial, which every action works on as well, and more trials.
    terminal.act(CHOOSE)
    terminal.choose("Which trial?", 0)
    terminal.act(MORE)
    terminal.answer("How many more trials?", CLEAR_LINE + "0\r")
    terminal.see("A whole number above 0, please.")
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


def test_the_question_about_a_study_found_on_disk(finished: Path) -> None:
    journal = Path("checkpoints/m.jsonl")
    content = journal.read_bytes()
    question = "There is a study in checkpoints/m.jsonl with 3 trials done. What now?"

    terminal = Terminal()
    terminal.choose(question, 2)
    assert terminal.leave() == 0
    assert journal.read_bytes() == content

    terminal = Terminal()
    terminal.choose(question, 0)
    terminal.see("Continuing the study checkpoints/m.jsonl (3 trials done).")
    terminal.see("Which trial?")
    time.sleep(0.3)
    terminal.interrupt()
    assert terminal.leave() == 0

    terminal = Terminal("--model-action", "none")
    terminal.choose(question, 1)
    terminal.see("3 trials done")
    assert terminal.leave() == 0
    assert Path("checkpoints/m.jsonl.old").exists()


def test_flags_answer_questions_and_the_rest_is_asked(finished: Path) -> None:
    terminal = Terminal("--checkpoint-action", "continue", "--model-action", "save", "--export-strategy", "merge")
    terminal.choose("Which trial?", 0)
    terminal.answer("Folder to save to:", "out\r")
    terminal.see("to out")
    assert terminal.leave() == 0
    assert Path("out/heretic.json").is_file()


def test_an_interrupted_search_goes_to_the_menu(talkative: Path) -> None:
    Path("config.toml").write_text(SMALL.replace("n_trials = 3", "n_trials = 5000"))
    terminal = Terminal("--trials-per-batch", "1")
    terminal.see("Best so far")
    terminal.interrupt()
    terminal.see("Which trial?")
    time.sleep(0.3)
    terminal.interrupt()
    assert terminal.leave() == 0


def test_columns_are_aligned() -> None:
    assert align([["#", "Trial"], ["10", "x"], ["1", "long text"]]) == ["#   Trial", "10  x", "1   long text"]
