"""Questions, menus and chat: what a person at a terminal can do with the trials, and the same actions if settings request them."""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import questionary
from huggingface_hub import get_token
from optuna.trial import FrozenTrial

from ..console import Console, answer_of
from ..editing.ablation import Ablation
from ..errors import HereticError
from ..evaluator import MOST_DIVERGENT_PROMPTS, Evaluator
from ..privacy import without_token
from ..prompts import Message, prompt_messages
from ..reporting.tables import finalists_table, trial_rows
from ..saving.export import save
from ..saving.record import Result, Strategy, measurements
from ..saving.staging import target_of
from ..saving.upload import HubRepository, upload
from ..saving.verify import divergence_check
from ..scoring.score_tables import divergent_rows, score_rows
from ..study.finalists import known_finalists
from ..study.front import is_learned, learned_strengths
from ..study.search import Search
from ..utils import screen_text
from .answers import require_extra, trial_at

COMPARED_PROMPTS = 5
CHAT_TOKENS = 2048


def ask_checkpoint_action(path: str, progress: str) -> str | None:
    """Continue a study found on disk, or start over; None: leave."""
    return select(
        f"There is already a study in {path} with {progress}. What do you want to do?",
        [("Continue it", "continue"), ("Start over (the existing file is kept under another name)", "restart"), ("Leave", None)],
    )


def select(question: str, choices: Sequence[tuple[str, Any]], header: str | None = None) -> Any:
    """One of several titled values, chosen with the arrow keys, below an optional header line; None if the user presses Ctrl+C."""
    heads = [] if header is None else [questionary.Separator(header)]
    answer = answer_of(questionary.select(question, choices=[*heads, *(questionary.Choice(t, value=(v,)) for t, v in choices)]).ask)
    return None if answer is None else answer[0]


@dataclass
class InteractiveSession:
    """What the menus and actions work on: a run whose model is loaded and whose study has trials."""

    console: Console
    evaluator: Evaluator
    search: Search
    run_trials: Callable[[int], object]

    def __post_init__(self) -> None:
        self.settings, self.model = self.evaluator.settings, self.evaluator.model

    def work(self) -> None:
        """Do what the settings say, or what the user chooses if they do not."""
        if self.settings.model_action is None:
            self.menu()
        else:
            self.act(self.settings.model_action)

    def _ablation(self, trial: FrozenTrial) -> Ablation:
        return self.search.edits.ablation_of(trial)

    def result_of(self, trial: FrozenTrial) -> Result:
        """A trial with everything that its record contains."""
        return Result(
            settings=self.settings,
            trial_number=trial.number,
            ablation=self._ablation(trial),
            learned=learned_strengths(trial) if is_learned(trial) else {},
            refusals=trial.user_attrs["refusals"],
            kl_divergence=trial.user_attrs["kl_divergence"],
            base_refusals=self.evaluator.original.refusals,
            n_bad_prompts=len(self.evaluator.bad_prompts),
            response_prefix=self.model.response_prefix,
            measurements=measurements(trial, known_finalists(self.search.study), self.evaluator.original.response_classes),
        )

    def act(self, action: str) -> None:
        """Do `action` with the trial at `settings.trial_index`, asking for whatever the settings do not say."""
        index = self.settings.trial_index
        trial = self._choose_trial() if index is None else trial_at(self.search.front, index)
        if trial is not None:
            self._action(action, trial)

    def menu(self) -> None:
        """Choose trials and actions until the user leaves."""
        while True:
            trial = self._choose_trial()
            if trial is None:
                return
            while True:
                action = select(f"What to do with trial {trial.number}?", _ACTIONS)
                if action is None or action == "choose":
                    break
                if action == "leave":
                    return
                try:
                    self._action(action, trial)
                except KeyboardInterrupt:
                    self.console.message("Interrupted.")
                except Exception as error:  # reported, and every other action stays usable
                    if self.settings.debug:
                        self.console.message(without_token(traceback.format_exc()))
                    self.console.error(without_token(str(error) if isinstance(error, HereticError) else f"{type(error).__name__}: {error}"))
                if action == "more":
                    break

    def _choose_trial(self) -> FrozenTrial | None:
        """A trial of the front, after running more trials if the user wants that; None: leave."""
        while True:
            front = self.search.front
            baseline, last_layer = self.evaluator.original.baseline, self.model.architecture.last_layer
            headers, rows = trial_rows(front, last_layer, baseline, self.settings.objectives)
            width = self.console.rich.width - 4  # wrapped lines would break the menu's layout
            header, *lines = [line if len(line) <= width else f"{line[: width - 1]}…" for line in align([headers, *rows])]
            choices = [*zip(lines, front, strict=True), ("Run more trials", "more"), ("Leave", None)]
            self.console.heading("Pareto front")
            if (table := finalists_table(front, known_finalists(self.search.study))) is not None:
                self.console.show(table)
            choice = select("Which trial?", choices, header)
            if choice != "more":
                return choice
            self._run_more()

    def _run_more(self) -> None:
        text = answer_of(questionary.text("How many additional trials?", default="50", validate=is_count).ask)
        if text is not None:
            self.run_trials(int(text))

    def _action(self, action: str, trial: FrozenTrial) -> None:
        actions: dict[str, Callable[[FrozenTrial], None]] = {
            "save": self._save,
            "upload": self._upload,
            "chat": self._chat,
            "compare": self._compare,
            "scores": self._show_scores,
            "benchmark": self._benchmark,
            "more": lambda _: self._run_more(),
        }
        actions[action](trial)

    def _strategy(self) -> Strategy | None:
        return self.settings.export_strategy or select("What to export?", _STRATEGIES)

    def _save(self, trial: FrozenTrial) -> None:
        strategy = self._strategy()
        if strategy is None:
            return
        overwrite = self.settings.overwrite
        directory = self.settings.save_directory
        if directory is None:
            directory = answer_of(questionary.path("Folder to save the model in:", only_directories=True).ask)
            if not directory:
                return
            target_of(self.settings, directory, overwrite=True)  # raises for a file, which must not be replaced whatever the answer is
            try:
                target_of(self.settings, directory, overwrite)
            except HereticError:
                overwrite = bool(answer_of(questionary.confirm(f"{directory} is not empty. Overwrite it?", default=False).ask))
                if not overwrite:
                    return
        check = divergence_check(self.model, self.evaluator, trial.user_attrs["kl_divergence"], self.console)
        target = save(self.model, self.result_of(trial), strategy, directory, overwrite, self.console, check)
        self.console.message(f"Saved trial {trial.number} to {target}")

    def _upload(self, trial: FrozenTrial) -> None:
        strategy = self._strategy()
        repo_id = self.settings.upload_repo_id or (strategy and answer_of(questionary.text("Repository (owner/name):").ask))
        if not strategy or not repo_id:
            return
        private = self.settings.upload_repo_private
        if private is None:
            private = select("Visibility of the repository?", [("Public", False), ("Private", True)])
        token = get_token() or answer_of(questionary.password("Hugging Face access token (not stored):").ask)
        if private is None or not token:
            return
        check = divergence_check(self.model, self.evaluator, trial.user_attrs["kl_divergence"], self.console)
        url = upload(self.model, self.result_of(trial), strategy, HubRepository(repo_id, private, token), self.console, check)
        self.console.message(f"Uploaded trial {trial.number} to {url}")

    def _compare(self, trial: FrozenTrial) -> None:
        """Responses of the original and the edited model to a few prompts, side by side."""
        prompts = self.evaluator.bad_prompts[:COMPARED_PROMPTS]
        length = self.settings.max_response_length
        before = self.model.responses(prompts, length, description="Responses of the original")
        after = self.model.responses(prompts, length, self._ablation(trial), description=f"Responses of trial {trial.number}")
        describe = self.evaluator.original.rule.described

        def with_verdict(text: str) -> str:
            return f"{describe(text, is_cut_off=True)}:\n{text.strip()}"

        rows = [[p.user, with_verdict(b), with_verdict(a)] for p, b, a in zip(prompts, before, after, strict=True)]
        self.console.columns("Before and after", ["Prompt", "Original", f"Trial {trial.number}"], rows)

    def _show_scores(self, trial: FrozenTrial) -> None:
        """All scores of a trial, and the harmless prompts with the largest KL divergence."""
        headers, rows = score_rows(trial, self.evaluator.original.scores, known_finalists(self.search.study))
        self.console.columns(f"Scores of trial {trial.number}", headers, rows)
        moved = self.evaluator.most_divergent(self._ablation(trial), MOST_DIVERGENT_PROMPTS)
        self.console.columns("Prompts with the largest KL divergence", *divergent_rows(moved))

    def _benchmark(self, trial: FrozenTrial) -> None:
        """Scores of the original and the edited model on the benchmarks of the settings."""
        require_extra("benchmark", "A benchmark")
        from ..scoring.benchmark import HEADERS, cells, run_benchmarks  # which imports the extra

        rows = run_benchmarks(self.model, self._ablation(trial), self.settings, self.console)
        self.console.columns(f"Benchmarks, original and trial {trial.number}", HEADERS, [cells(row) for row in rows])

    def _chat(self, trial: FrozenTrial) -> None:
        """A conversation with the edited model. Ctrl+C stops a response; at the question, Ctrl+C or Ctrl+D ends the chat."""
        self.console.message(
            "Chat with the edited model. Ctrl+C stops a response; an empty line or Ctrl+C at the prompt returns to the menu."
        )
        system = prompt_messages(self.evaluator.bad_prompts[0])[:-1]
        messages: list[Message] = list(system)
        ablation = self._ablation(trial)
        while True:
            question = answer_of(questionary.text("You:").ask)
            if not question:
                return
            messages.append({"role": "user", "content": question})
            self.console.rich.print("[bold]Model:[/] ", end="")
            try:
                answer = self.model.stream_response(messages, CHAT_TOKENS, ablation, _write)
            except KeyboardInterrupt:
                messages.pop()
                _write("\n(interrupted)\n")
                continue
            _write("\n")
            messages.append({"role": "assistant", "content": answer.strip()})


_ACTIONS = [
    ("Save to a folder", "save"),
    ("Upload to Hugging Face", "upload"),
    ("Chat with the edited model", "chat"),
    ("Show responses before and after", "compare"),
    ("Show all scores", "scores"),
    ("Run benchmarks before and after", "benchmark"),
    ("Choose another trial", "choose"),
    ("Run more trials", "more"),
    ("Leave", "leave"),
]
_STRATEGIES = [("The full model, edited exactly (merge)", "merge"), ("A small PEFT adapter (adapter)", "adapter")]


def _write(text: str) -> None:
    sys.stdout.write(screen_text(text))
    sys.stdout.flush()


def is_count(text: str) -> bool | str:
    """True for a number of trials, else the message to show."""
    return (text.isdecimal() and int(text) > 0) or "Enter an integer above 0."


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of texts as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
