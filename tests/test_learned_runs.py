"""Whole runs that learn edits: what the study holds, what is saved, what a kill costs, and what is reported if nothing can be learned."""

import json
import math
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import process
from conftest import Outcome
from heretic.editing.ablation import LearnedEdit
from heretic.errors import LearningError, TrialError
from heretic.evaluator import Evaluator, Score
from heretic.prompts import Prompt
from heretic.scoring.learned_rule import LearnedRule
from heretic.study import learned_search, learning
from heretic.study.front import front_of, is_learned
from heretic.study.learned_edits import LearnedEdits, State, learned_trials
from heretic.study.learning import Learner
from test_demo import DEMO, SYSTEM, Judge, lines, mean_kl
from test_experts import N_EXPERTS, chat_model
from tiny import Recorder, load

COMPONENTS = ("attn.o_proj", "mlp.down_proj")
N_PROMPTS, N_EVALUATED = 40, 20
assert chat_model  # a fixture
STUDY = f"""\
model = "{DEMO / "model"}"
dtypes = ["float32"]
seed = 1
n_learned_trials = 2
n_trials = 2
n_startup_trials = 1
n_finalists = 0
max_response_length = 24
report = false
good_prompts.dataset = "good.txt"
bad_prompts.dataset = "bad.txt"
good_evaluation_prompts.dataset = "good_evaluation.txt"
bad_evaluation_prompts.dataset = "bad_evaluation.txt"
"""
# One learned trial, and no search.
ONE = ["--n-trials", "0", "--n-startup-trials", "0", "--n-learned-trials", "1"]
TWO_ROUNDS = {"FIRST_ROUNDS": 2, "LATER_ROUNDS": 1}


def write_study(folder: Path) -> None:
    """Some of the demonstration's prompts, and the settings."""
    for name in ("good", "bad", "good_evaluation", "bad_evaluation"):
        n = N_EVALUATED if name.endswith("evaluation") else N_PROMPTS
        (folder / f"{name}.txt").write_text("\n".join(lines(name, n)), encoding="utf-8")
    (folder / "config.toml").write_text(STUDY, encoding="utf-8")


def learn_briefly(setattr_: Callable[..., object] = setattr) -> None:
    """Fewer rounds, two of the first trial, one of the others, and fewer prompts asked between them."""
    for name, value in TWO_ROUNDS.items():
        setattr_(learning, name, value)
        setattr_(learned_search, name, value)
    setattr_(learning, "MOST_LATER_ROUNDS", 1)
    setattr_(learning, "MORE_PROMPTS", learning.ROUND_PROMPTS)


def begin(folder: Path, *arguments: str, before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run the command in `folder`, in a process of its own; its exit code and what it said."""

    def prepare() -> None:
        os.chdir(folder)
        os.environ.pop("HERETIC_N_LEARNED_TRIALS", None)
        learn_briefly()
        before()

    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    code = process.wait(process.start(arguments, str(output), prepare))
    return code, output.read_text(encoding="utf-8")


def journal_of(folder: Path) -> Path:
    (journal,) = (folder / "checkpoints").glob("*.jsonl")
    return journal


def study_of(folder: Path) -> optuna.Study:
    """Opened as Optuna's own tools would."""
    return optuna.load_study(study_name="heretic", storage=JournalStorage(JournalFileBackend(str(journal_of(folder)))))


def edit_file(folder: Path, trial: FrozenTrial) -> Path:
    journal = journal_of(folder)
    path: Path = journal.with_name(f"{journal.name}.artifacts") / trial.user_attrs["learned"]["edit"]
    return path


def edits_of(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(edit_file(folder, trial)) for trial in study_of(folder).trials if is_learned(trial)]


def same_edits(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of two learned trials and two of the search. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    folder.mkdir()
    write_study(folder)
    code, said = begin(folder, "--report", "--n-finalists", "4")
    assert code == 0, said
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory for a study that is to be begun."""
    write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HERETIC_N_LEARNED_TRIALS")
    learn_briefly(monkeypatch.setattr)
    return tmp_path


@pytest.fixture
def copied(finished: Path, place: Path) -> Path:
    """A working directory with a copy of the finished study."""
    shutil.copytree(finished / "checkpoints", place / "checkpoints")
    return place


def place_in_front(folder: Path) -> tuple[int, FrozenTrial]:
    """A learned trial of the front, and its place there."""
    return next((i, trial) for i, trial in enumerate(front_of(study_of(folder))) if is_learned(trial))


# What there is


def test_the_study_tells_of_learned_trials(finished: Path) -> None:
    study = study_of(finished)
    learned = [trial for trial in study.trials if trial.user_attrs["origin"] == "learned"]
    assert [trial.user_attrs["origin"] for trial in study.trials] == ["learned", "learned", "search", "search"]
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    with safe_open(edit_file(finished, learned[0]), "pt") as file:
        _, refusing = json.loads(file.metadata()["facts"])["reached"]  # what the second trial's weight hangs on
    for number, trial in enumerate(learned):
        attributes = trial.user_attrs
        assert (trial.params, attributes["direction_index"], attributes["parameters"]) == ({}, None, None)
        assert isinstance(attributes["refusals"], int) and isinstance(attributes["kl_divergence"], float)
        assert trial.values[0] == attributes["refusals"] / N_EVALUATED
        own = attributes["learned"]
        assert (own["number"], own["steps"]) == (number, [2, 1][number] * learning.ROUND_STEPS)
        assert own["weight"] == pytest.approx([4.0, 4.0 * (0.5 + 0.35 * min(1.0, refusing / 0.03))][number])
        names = [f"model.layers.{i}.{name}" for i in range(8) for name in ("self_attn.o_proj", "mlp.down_proj")]
        assert [writer["writer"] for writer in own["writers"]] == names
        assert [writer["layer"] for writer in own["writers"]] == [i for i in range(8) for _ in range(2)]
        tensors = load_file(edit_file(finished, trial))
        assert {name for name in tensors if name.startswith("direction.")} == {f"direction.{name}" for name in names}
        strengths = tensors["state.average.strengths"].tolist()
        assert [writer["strength"] for writer in own["writers"]] == [round(s, 4) for s in strengths]
        for name in names:
            assert float(tensors[f"direction.{name}"].double().norm()) == pytest.approx(1, abs=1e-6)
        assert all(0.3 < writer["cosine"] < 1 for writer in own["writers"])
    # The prompts of the evaluation were not learned from, and nearly all of them are answered.
    assert study.user_attrs["base_refusals"] == N_EVALUATED
    assert min(trial.user_attrs["refusals"] for trial in learned) <= N_EVALUATED // 4
    assert all(not is_learned(trial) and trial.params for trial in study.trials[2:])


def test_the_screen_and_the_report_tell_of_learned_trials(finished: Path) -> None:
    said = (finished / "output.txt").read_text(encoding="utf-8")
    first = study_of(finished).trials[0].user_attrs
    assert re.search(
        rf"\nLearned edit 1/2: {first['refusals']} of {N_EVALUATED} refused \(original {N_EVALUATED}\), KL divergence "
        rf"{first['kl_divergence']:.4f} \(sequence {first['sequence_kl_divergence']:.4f}\); {2 * learning.ROUND_STEPS} steps, \d+",
        said,
    )
    assert said.index("Learned edit 2/2: ") < said.index("\nSearch: 2 trials, 0 done\n") < said.index("\nTrial 1/2: ")
    assert "\n2 trials done, 2 edits learned\n" in said
    index, trial = place_in_front(finished)
    row = next(line for line in said.splitlines() if line.startswith(f"│ {index} ") and "learned" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    strengths = {name: [w["strength"] for w in trial.user_attrs["learned"]["writers"] if w["component"] == name] for name in COMPONENTS}
    assert cells[-2:] == [f"{min(found):.2f} to {max(found):.2f}" for found in strengths.values()]
    page = journal_of(finished).with_suffix(".report.html").read_text(encoding="utf-8")
    assert "<h3>Learned directions</h3>" in page
    assert escape("Cosine between each layer's learned direction and its difference of means") in page
    again = study_of(finished).user_attrs["finalists"]["trials"]
    assert str(trial.number) in again and "failure" not in again[str(trial.number)]


def saved_as(strategy: str, index: int) -> list[str]:
    return ["--trial-index", str(index), "--model-action", "save", "--export-strategy", strategy, "--save-directory", strategy]


def test_what_is_saved_of_a_learned_trial(copied: Path, heretic: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and adapter, judged by transformers and PEFT alone; record and card; rebuilt bit by bit; compared."""
    index, trial = place_in_front(copied)
    for strategy in ("merge", "adapter"):
        outcome = heretic(*saved_as(strategy, index))
        assert (outcome.code, outcome.err) == (0, "")
    assert len(study_of(copied).trials) == 4
    prompts = lines("good_evaluation", N_EVALUATED)
    original, saved, adapted = Judge(DEMO / "model"), Judge(Path("merge")), Judge(DEMO / "model")
    adapted.model = PeftModel.from_pretrained(adapted.model, "adapter").eval()
    before, merged, adapter = (judge.first_token(prompts) for judge in (original, saved, adapted))
    # The model is stored in bfloat16, and was searched in float32.
    assert mean_kl(before, merged) == pytest.approx(trial.user_attrs["kl_divergence"], rel=0.2, abs=1e-3)
    assert mean_kl(before, adapter) == pytest.approx(trial.user_attrs["kl_divergence"], rel=0.02, abs=1e-4)
    record = json.loads(Path("merge/heretic.json").read_text())
    own = record["trial"]
    assert (own["number"], own["origin"], own["direction_index"], own["parameters"]) == (trial.number, "learned", None, None)
    writers = trial.user_attrs["learned"]["writers"]
    expected = {c: [[w["layer"], w["strength"], w["cosine"]] for w in writers if w["component"] == c] for c in COMPONENTS}
    assert own["learned"] == expected
    assert own["modules"] == {"attn.o_proj": 8, "mlp.down_proj": 8}
    card = Path("merge/README.md").read_text(encoding="utf-8")
    assert "directions in the residual stream, learned by gradient" in card and "| direction | learned, each layer's own |" in card
    row = f"| 3 | {writers[6]['cosine']:.4f} | {writers[6]['strength']:.4f} | {writers[7]['strength']:.4f} |"
    assert row in card
    for strategy in ("merge", "adapter"):
        outcome = heretic("--export-from", strategy, "--save-directory", f"{strategy} again", "--model", DEMO / "model")
        assert (outcome.code, outcome.err) == (0, "")
        again = {path.name: path.read_bytes() for path in Path(f"{strategy} again").iterdir()}
        assert again == {path.name: path.read_bytes() for path in Path(strategy).iterdir()}
    monkeypatch.setenv("COLUMNS", "300")
    outcome = heretic("compare", DEMO / "model", f"{journal_of(copied)}:{index}")
    assert outcome.code == 0, outcome.err
    row = next(line for line in outcome.out.splitlines() if line.startswith("│") and f"(trial {trial.number})" in line)
    assert f"{trial.user_attrs['kl_divergence']:.4f}" in row


def test_more_trials_follow_and_nothing_is_learned_anew(copied: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic("--n-additional-trials", "1")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Learning" not in outcome.out
    trials = study_of(copied).trials
    assert [trial.user_attrs["origin"] for trial in trials] == ["learned", "learned", "search", "search", "search"]


# Begun, cut off, gone on


def killed_at(trial: int, step: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """To be called in a process that is to send itself a signal before a step of a learned trial."""

    def prepare() -> None:
        learn, left = Learner.learn, [-1]

        def noted(self: Learner, number: int, *arguments: Any) -> Any:
            left[0] = step if number == trial else -1
            return learn(self, number, *arguments)

        take_step = Learner._step

        def counted(self: Learner, *arguments: Any) -> None:
            if left[0] == 0:
                os.kill(os.getpid(), number)
            left[0] -= 1
            take_step(self, *arguments)

        Learner.learn, Learner._step = noted, counted  # type: ignore[method-assign,assignment]

    return prepare


@pytest.mark.parametrize(("trial", "step"), [pytest.param(0, 6, marks=pytest.mark.long), (1, 2)])
def test_a_kill_in_the_middle_of_learning_changes_nothing(finished: Path, tmp_path: Path, trial: int, step: int) -> None:
    """What was finished is kept; what was cut off is learned again, the same; and so is the search after it."""
    write_study(tmp_path)
    code, said = begin(tmp_path, before=killed_at(trial, step))
    assert (code, said.count("Learned edit ")) == (-signal.SIGKILL, trial)
    before = [(t.number, t.user_attrs) for t in study_of(tmp_path).trials]
    assert len(before) == trial
    code, said = begin(tmp_path)
    assert code == 0, said
    assert said.count("Learned edit ") == 2 - trial
    assert [(t.number, t.user_attrs) for t in study_of(tmp_path).trials][:trial] == before
    assert same_edits(edits_of(tmp_path), edits_of(finished))
    assert [t.params for t in study_of(tmp_path).trials] == [t.params for t in study_of(finished).trials]
    assert [t.values for t in study_of(tmp_path).trials] == [t.values for t in study_of(finished).trials]


@pytest.mark.long
def test_another_seed_learns_another_edit(finished: Path, place: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic("--seed", "2", *ONE)
    assert (outcome.code, outcome.err) == (0, "")
    assert not same_edits(edits_of(place), edits_of(finished)[:1])
    assert edits_of(place)[0].keys() == edits_of(finished)[0].keys()
    assert len(study_of(place).trials) == 1
    assert "Search:" not in outcome.out and "\n0 trials done, 1 edit learned\n" in outcome.out


@pytest.mark.long
def test_ctrl_c_in_learning_shows_the_front(place: Path) -> None:
    code, said = begin(place, before=killed_at(1, 1, signal.SIGINT))
    assert code == 0, said
    assert "\nStopping: the edit being learned is left to the next run. Press Ctrl+C again to leave at once.\n" in said
    assert "Learned edit 1/2" in said and "Learned edit 2/2" not in said
    assert "Search:" not in said and "Pareto front" in said
    assert [is_learned(trial) for trial in study_of(place).trials] == [True]
    code, said = begin(place)
    assert code == 0 and "Learned edit 2/2" in said and "Trial 2/2" in said


def test_ctrl_c_before_anything_is_learned(place: Path) -> None:
    code, said = begin(place, before=killed_at(0, 1, signal.SIGINT))
    assert (code, said.splitlines()[-1]) == (130, "Interrupted.")
    assert study_of(place).trials == []


# What can be left out


def test_disabled_components_are_left_alone(place: Path, heretic: Callable[..., Outcome]) -> None:
    only = [*ONE, "--disabled-components", '["mlp.down_proj"]']
    outcome = heretic(*only, *saved_as("merge", 0))
    assert (outcome.code, outcome.err) == (0, "")
    (trial,) = study_of(place).trials
    assert {writer["component"] for writer in trial.user_attrs["learned"]["writers"]} == {"attn.o_proj"}
    before = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype="bfloat16").state_dict()
    after = AutoModelForCausalLM.from_pretrained("merge", dtype="bfloat16").state_dict()
    changed = {name.split(".", 3)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"self_attn.o_proj.weight"}
    assert list(json.loads(Path("merge/heretic.json").read_text())["trial"]["learned"]) == ["attn.o_proj"]


def test_no_learned_trials(place: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic("--n-learned-trials", "0", "--n-trials", "1", "--n-startup-trials", "1")
    assert (outcome.code, outcome.err) == (0, "")
    assert "earn" not in outcome.out.replace("learned rule", "")
    assert not list(Path("checkpoints").glob("*.artifacts"))
    assert [trial.user_attrs["origin"] for trial in study_of(place).trials] == ["search"]


def test_a_model_that_refuses_too_little(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    """It is told once, and the search goes on; a resume does not try again."""
    outcome = heretic("--n-learned-trials", "2")
    told = r"No edits are learned: the original refuses [0-5] of 5 harmful prompts, which is too few\. The search continues without them\."
    assert outcome.code == 0
    assert re.search(told, " ".join(outcome.out.split()))
    assert len(study_of(workplace).trials) == 3
    again = heretic("--n-learned-trials", "2", "--n-trials", "4")
    assert (again.code, again.err) == (0, "") and "Learning" not in again.out and "No edits are" not in again.out
    assert len(study_of(workplace).trials) == 4


def test_nothing_can_be_learned_and_there_is_no_search(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic("--n-learned-trials", "2", "--n-trials", "0", "--n-startup-trials", "0")
    told = "Error: There is no trial: no edit could be learned. Run the same command with --n-trials 200, for a search.\n"
    assert (outcome.code, outcome.err) == (1, told)
    assert "which is too few." in outcome.out and "The search continues" not in outcome.out
    again = heretic("--n-learned-trials", "2", "--n-trials", "2")
    assert (again.code, again.err) == (0, "") and len(study_of(workplace).trials) == 2


def test_prompts_that_leave_no_room_for_responses(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    """Directions take none, but learning does, and so does the detection of a prefix."""
    Path("long.txt").write_text("hello\n" + "how " * 225, encoding="utf-8")  # with the template 235 tokens
    told = "Error: bad_prompts: prompt 2 has 235 tokens, which with {} new ones exceeds the model's context length of 256. Shorten it. It"
    lines = Path("config.toml").read_text(encoding="utf-8").splitlines()
    for n, arguments in ((24, ["--n-learned-trials", "1"]), (32, [])):
        if n == 32:
            Path("config.toml").write_text("\n".join(line for line in lines if "response_prefix" not in line), encoding="utf-8")
        outcome = heretic("--bad-prompts.dataset", "long.txt", *arguments)
        assert outcome.code == 1 and outcome.err.startswith(told.format(n))


# What goes wrong


def lost(trial: FrozenTrial) -> str:
    edit = trial.user_attrs["learned"]["edit"]
    return (
        f"Error: The learned edit of trial {trial.number}, artifact {edit} of the study, is missing or damaged. "
        "Restore the file, or choose another trial.\n"
    )


def spoiled(how: str, path: Path) -> None:
    tensors = load_file(path)
    names = [name for name in tensors if name.startswith("direction.")]
    metadata = {"strengths": json.dumps({name.removeprefix("direction."): 1.0 for name in names}), "facts": "{}"}
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "nonsense":
        path.write_bytes(b"nonsense")
    elif how == "another file":
        save_file(tensors, path)
    elif how == "not finite":
        save_file(tensors | {names[0]: torch.full((128,), torch.nan)}, path, metadata)
    elif how == "a writer missing":
        save_file({name: t for name, t in tensors.items() if name != names[0]}, path, metadata)


@pytest.mark.parametrize("how", ["missing", "cut off", "nonsense", "another file", "not finite", "a writer missing"])
def test_an_edit_that_is_missing_or_damaged(copied: Path, heretic: Callable[..., Outcome], how: str) -> None:
    index, trial = place_in_front(copied)
    spoiled(how, edit_file(copied, trial))
    outcome = heretic("compare", DEMO / "model", f"{journal_of(copied)}:{index}")
    assert (outcome.code, outcome.err) == (1, lost(trial))


def test_the_front_is_shown_without_an_edit_that_is_missing(copied: Path, heretic: Callable[..., Outcome]) -> None:
    _, trial = place_in_front(copied)
    edit_file(copied, trial).unlink()
    journal = journal_of(copied)
    journal.write_text("".join(line for line in journal.read_text().splitlines(keepends=True) if '"samples"' not in line))
    outcome = heretic("--report", "--n-finalists", "4", "--final-response-length", "9")
    assert (outcome.code, outcome.err) == (0, "")
    reason = lost(trial).removeprefix("Error: ").strip()
    assert f"Warning: Trial {trial.number} was not scored again: {reason}" in outcome.out
    assert f"Warning: The report contains no new responses: {reason}" in outcome.out
    assert "Pareto front" in outcome.out


def test_learning_cannot_go_on_from_an_edit_that_is_missing(copied: Path, heretic: Callable[..., Outcome]) -> None:
    edit_file(copied, study_of(copied).trials[1]).unlink()
    outcome = heretic("--n-learned-trials", "3", "--n-trials", "3")
    assert (outcome.code, outcome.err) == (0, "")
    told = "No more edits are learned: they start from the edit of trial 1, which is missing or damaged. The search continues without them."
    assert told in " ".join(outcome.out.split())
    assert len(study_of(copied).trials) == 5


def test_an_edit_whose_objective_fails(place: Path, heretic: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recorded as a failed trial, so that a resumed run does not fail on it again."""

    def objectives(evaluator: Evaluator, score: Score) -> tuple[float, ...]:
        raise TrialError("the objective of the scorer mine is nan, which is not a finite number")

    monkeypatch.setattr(Evaluator, "objectives", objectives)
    outcome = heretic(*ONE)
    told = "Error: No trial could be scored: all 1 failed. The last one: TrialError: the objective of the scorer mine is nan, which is not"
    assert outcome.code == 1 and outcome.err.startswith(told)
    (trial,) = study_of(place).trials
    assert trial.state == TrialState.FAIL and is_learned(trial)


def test_another_process_learns_the_same_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that begin at the same time: what the other one has recorded is not recorded again."""
    study = optuna.create_study(directions=["minimize"])
    recorder = Recorder()

    def record(number: int) -> FrozenTrial:
        attributes = {"origin": "learned", "learned": {"number": number}}
        study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes))
        return study.trials[-1]

    def learn(number: int, *_: object) -> learning.Outcome:
        if number == 1:
            record(1)
        return learning.Outcome(0.0, 0, 10)

    learner = SimpleNamespace(next_weight=lambda: 1.0, learn=learn)
    monkeypatch.setattr(learned_search.LearnedTrials, "_learner", lambda *_: learner)
    monkeypatch.setattr(learned_search.LearnedTrials, "_record_trial", lambda own, learner, facts, start: record(facts["number"]))
    evaluator: Any = SimpleNamespace(settings=SimpleNamespace(n_learned_trials=4), progress=recorder)
    learned_search.LearnedTrials(study, "here", LearnedEdits(None), evaluator).learn(([], []))
    assert recorder.messages == ["Another process learns the edits of this study. They are left to it."]
    assert [trial.user_attrs["learned"]["number"] for trial in study.trials] == [0, 1]
    record(1)  # should both have recorded it
    assert [trial.number for trial in learned_trials(study)] == [0, 1]


def test_a_kept_edit_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trial is, too, and must not be there without it after the power has failed."""
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    edits = LearnedEdits.of_journal(tmp_path / "study.jsonl")
    edit = LearnedEdit({"w": torch.ones(4)}, {"w": 0.5})
    name = edits.keep(optuna.create_study(), edit, State({"directions": torch.ones(1, 4)}, {"weight": 1.0}))
    assert flushed == [tmp_path / "study.jsonl.artifacts" / name]
    assert list((tmp_path / "study.jsonl.artifacts").iterdir()) == flushed
    trial = optuna.trial.create_trial(value=1.0, user_attrs={"learned": {"edit": name}})
    found, state = edits.load(trial)
    assert torch.equal(found.directions["w"], torch.ones(4)) and (found.strengths, state.facts) == ({"w": 0.5}, {"weight": 1.0})


# Passes that do not fit


@pytest.fixture(scope="module")
def taught() -> Learner:
    """A learner of the demonstration model, before its first step."""
    model = load(DEMO / "model")
    good, bad = ([Prompt(SYSTEM, text) for text in lines(name, 16)] for name in ("good", "bad"))
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(9, 128, generator=generator, dtype=torch.float64), dim=-1)
    model.use_directions(directions, "full")
    return Learner(model, LearnedRule(), good, bad, list(model.architecture.components), 1)


def test_answers_of_an_edit_do_not_count_for_how_the_original_refuses(taught: Learner) -> None:
    """An answer that begins like the original's refusals is learned along, but the beginning stays one of a refusal; another one counts."""
    opening = next(own for path in taught.paths[0] if path.refuses for own in [taught.openings.decided(path.tokens)])
    state, own_state, paths = taught.openings.state(), taught._own_openings.state(), taught.paths[0].copy()
    try:
        for beginning in ((), opening):
            tokens = [*beginning, *taught.model.tokenizer.encode(" Warm the milk first, then stir it well.", add_special_tokens=False)]
            assert not taught._note(0, tokens, True, is_edited=True)
            assert taught.paths[0][-1].tokens == tuple(tokens) and not taught.paths[0][-1].refuses
            assert (taught.openings.state() == state) == bool(beginning)
            taught.openings.restore(state)
        assert taught.openings.refuses(opening)
    finally:
        taught.paths[0] = paths
    assert taught._own_openings.state() == own_state


def gradients(learner: Learner) -> tuple[float, list[Tensor]]:
    for optimizer in learner.edit.optimizers:
        optimizer.zero_grad()
    terms = [learner._harmless(i, 0.1) for i in range(6)] + [learner._harmful(learner.paths[i][0], 0.1) for i in range(6)]
    loss = learner.passes.total(terms, 2.0).weighted(2.0)
    return loss, [parameter.grad.clone() for parameter in (learner.edit.directions, learner.edit.strengths) if parameter.grad is not None]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_makes_passes_smaller(taught: Learner, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First layers are computed twice, then rows are halved; loss and gradients are the same, and nothing counts twice."""
    monkeypatch.setattr(taught.passes, "checkpoints", False)
    monkeypatch.setattr(taught.passes, "tokens", 4096)
    loss, usual = gradients(taught)
    sizes: list[int] = []
    forward, backward = taught.model.packed_logits, torch.autograd.backward

    def limited(rows: list[tuple[int, ...]], counts: list[int], by_row: bool) -> list[Tensor]:
        sizes.append(len(rows))
        if where == "forward" and len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(rows, counts, by_row)

    def too_late(loss: Tensor) -> None:
        backward(loss)
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(taught.model, "packed_logits", limited)
    if where == "backward":
        monkeypatch.setattr(torch.autograd, "backward", too_late)
    found, halved = gradients(taught)
    assert taught.passes.checkpoints and 12 in sizes and sizes[-1] <= 2
    assert found == pytest.approx(loss, rel=1e-5)
    for a, b in zip(halved, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


def test_the_originals_pass_is_made_smaller_too(taught: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught.passes, "tokens", 4096)
    monkeypatch.setattr(taught.passes, "checkpoints", False)
    terms = [taught._harmless(i, 1.0) for i in range(6)]
    expected = taught.passes.original_logprobs(terms)
    forward = taught.model.packed_logits

    def limited(rows: list[tuple[int, ...]], counts: list[int], by_row: bool) -> list[Tensor]:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(rows, counts, by_row)

    monkeypatch.setattr(taught.model, "packed_logits", limited)
    for a, b in zip(taught.passes.original_logprobs(terms), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_single_prompt_that_does_not_fit(taught: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught.passes, "tokens", 4096)
    monkeypatch.setattr(taught.passes, "checkpoints", False)
    gradients(taught)  # so that the original's are known

    def full(rows: list[tuple[int, ...]], counts: list[int], by_row: bool) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(taught.model, "packed_logits", full)
    with pytest.raises(LearningError, match=r"^memory does not suffice for the gradient of a single prompt$"):
        gradients(taught)


@pytest.mark.parametrize(("refusing", "n_rounds", "kept"), [((0.1,), 1, 0), ((0.4, 0.1), 2, 1), ((0.4, 0.35, 0.5), 3, 1)])
def test_a_trial_that_gets_worse_goes_on(
    taught: Learner, refusing: tuple[float, ...], n_rounds: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later trial ends once it is hardly worse than where it began, at its own weight of the refusals, or after three rounds."""
    losses = iter(refusing)
    seen: list[dict[str, Tensor]] = []

    def kept_back() -> learning.Losses:
        seen.append(taught.edit.state())
        return learning.Losses(0.1, next(losses))

    def step(terms: object, weight: float) -> None:
        taught.edit.strengths.data += 0.001

    before = taught.edit.state()
    monkeypatch.setattr(taught, "_weight", 2.5)
    monkeypatch.setattr(taught, "_reached", learning.Losses(0.2, 0.2))  # with weight 2: 0.6, and up to 0.75 is not worse
    monkeypatch.setattr(taught, "_kept_back_losses", kept_back)
    monkeypatch.setattr(taught, "_step", step)
    advanced: list[int] = []
    outcome = taught.learn(1, 2.0, advanced.append)
    assert outcome is not None and outcome.n_steps == n_rounds * learning.ROUND_STEPS == len(seen) * learning.ROUND_STEPS
    assert outcome.loss == pytest.approx(0.1 + 2 * refusing[kept]) and torch.equal(taught.edit.strengths, seen[kept]["strengths"])
    assert sum(advanced) == learning.LATER_ROUNDS * learning.ROUND_STEPS  # what was announced
    taught.edit.restore(before)


def test_the_weight_of_the_refusals_falls_the_faster_the_less_refuses(taught: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught, "_weight", None)
    assert taught.next_weight() == 4
    monkeypatch.setattr(taught, "_weight", 4.0)
    falling = ((0.0, 0.0, 2.0), (0.015, 0.0, 2.7), (0.0, 0.015, 2.7), (0.03, 0.015, 3.4), (2.0, 0.0, 3.4), (0.0, 0.5, 3.4))
    for loss, share, expected in falling:
        monkeypatch.setattr(taught, "_reached", learning.Losses(0.1, loss))
        monkeypatch.setattr(taught, "_refusing", share)
        assert taught.next_weight() == pytest.approx(expected)
    tensors, facts = taught.state()
    monkeypatch.setattr(taught, "_weight", 1.0)
    taught.restore(tensors, json.loads(json.dumps(facts)))
    assert taught.next_weight() == pytest.approx(3.4), "a resumed run goes on from there"


def test_more_prompts_are_asked_once_one_refuses(taught: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    refusing: set[int] = set()

    def respond(prompts: Sequence[int], *_: object) -> list[bool]:
        asked.append(list(prompts))
        return [prompt in refusing for prompt in prompts]

    monkeypatch.setattr(taught, "_respond", respond)
    monkeypatch.setattr(taught, "bad", list(range(100, 200)))
    assert taught._ask(random.Random(0), [7], 32) == [False] * 9
    ((first, *others),) = asked
    assert first == 7 and len(set(others)) == 8 and set(others) <= set(taught.bad)

    asked.clear()
    refusing.add(7)
    assert taught._ask(random.Random(0), [7], 32) == [True] + [False] * 32
    assert [len(part) for part in asked] == [9, 24] and asked[0] == [7, *others] and len({*asked[0], *asked[1]}) == 33

    asked.clear()
    assert taught._ask(random.Random(0), [7], 0) == [True] and asked == [[7]], "after the last round nothing more is learned from"


def test_a_gradient_that_is_not_finite(taught: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught.passes, "checkpoints", False)
    forward = taught.model.packed_logits
    monkeypatch.setattr(taught.model, "packed_logits", lambda *given, **named: [logits * torch.nan for logits in forward(*given, **named)])
    before = taught.edit.state()
    with pytest.raises(LearningError, match=r"^the gradient of the loss \(nan\) is missing or not finite$"):
        taught.learn(0, 6.0, lambda n: None)
    assert torch.equal(taught.edit.directions, before["directions"])


def test_a_loss_that_is_not_finite(taught: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    before = taught.edit.state()
    monkeypatch.setattr(taught, "_step", lambda terms, weight: None)
    monkeypatch.setattr(taught.passes, "total", lambda terms: learning.Losses(0.1, math.nan))
    with pytest.raises(LearningError, match=r"^the loss at the prompts that are kept back is not finite \(0.1, nan\)$"):
        taught.learn(0, 6.0, lambda n: None)
    taught.edit.restore(before)


# Other kinds of models


def refused_by(folder: Path) -> int:
    """Of the harmful evaluation prompts, those that a saved model refuses in transformers alone."""
    answers = Judge(folder).answers(lines("bad_evaluation", N_EVALUATED), 24)
    return sum(LearnedRule().judge(answer, True).kind == "refusal" for answer in answers)


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.long), "full"])
def test_a_4_bit_run_learns(place: Path, heretic: Callable[..., Outcome], mode: str) -> None:
    outcome = heretic("--quantization", "bnb_4bit", *ONE, "--row-normalization", mode, *saved_as("merge", 0))
    assert (outcome.code, outcome.err) == (0, "")
    (trial,) = study_of(place).trials
    assert len(trial.user_attrs["learned"]["writers"]) == 16
    assert refused_by(Path("merge")) <= 10 and trial.user_attrs["refusals"] <= 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_mixture_of_experts_learns(chat_model: Path, place: Path, heretic: Callable[..., Outcome], mode: str) -> None:
    """Fused experts, as a component of their own; what is saved is judged by transformers alone."""
    outcome = heretic(str(chat_model), *ONE, "--row-normalization", mode, "--split-experts", *saved_as("merge", 0))
    assert (outcome.code, outcome.err) == (0, "")
    (trial,) = study_of(place).trials
    assert [w["component"] for w in trial.user_attrs["learned"]["writers"]] == ["attn.o_proj", "mlp.experts.down_proj"] * 8
    saved = json.loads(Path("merge/heretic.json").read_text())["trial"]
    assert saved["modules"] == {"attn.o_proj": 8, "mlp.experts.down_proj": 8 * N_EXPERTS}
    assert list(saved["learned"]) == ["attn.o_proj", "mlp.experts.down_proj"]
    assert refused_by(Path("merge")) <= 10 and trial.user_attrs["refusals"] <= 10
    assert trial.user_attrs["kl_divergence"] < 0.5
