"""The journal on disk: what is in it, what it survives, and which study it may be."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import tiny
from conftest import Outcome
from heretic.config import Settings
from heretic.errors import CheckpointError, TrialError
from heretic.evaluator import Evaluator
from heretic.settings_sources import load_settings
from heretic.study.checkpoint import Checkpoint
from heretic.study.journal import journal_path

Heretic = Callable[..., Outcome]
JOURNAL = Path("checkpoints/m.jsonl")
ANOTHER = (
    "Error: The study {} does not match this run: {}. Start over with --checkpoint-action restart (the old file is kept), or use another "
    "--study-checkpoint-dir.\n"
)


def study(path: Path = JOURNAL) -> optuna.Study:
    """The study as Optuna's own tools open it."""
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(path))))


def parameters(path: Path = JOURNAL) -> list[str]:
    """The parameters of complete trials, in order."""
    return [str(trial.params) for trial in study(path).trials if trial.state == TrialState.COMPLETE]


# What is in it


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen--Qwen3-4B-Instruct-2507.jsonl"),
        ("a.b_c/d-e", "a--b_c--d-e.jsonl"),
        ("/models/my model", "--models--my--model.jsonl"),
        ("../modèle", "------modèle.jsonl"),
    ],
)
def test_the_file_is_named_after_the_model(model: str, name: str) -> None:
    assert journal_path(Settings(model=model, study_checkpoint_dir="x")) == Path("x") / name


def test_a_folder_without_a_study(workplace: Path) -> None:
    with Checkpoint(load_settings([])) as checkpoint:
        assert (checkpoint.found, checkpoint.exists, checkpoint.n_done) == (None, False, 0)
        with pytest.raises(CheckpointError, match=r"^There is no study in checkpoints/m\.jsonl\.$"):
            checkpoint.note(target=1)


def test_the_journal_is_a_plain_optuna_journal(heretic: Heretic, workplace: Path) -> None:
    assert heretic("--n-trials", "5").code == 0
    opened = study()
    assert opened.study_name == "heretic"
    assert [direction.name for direction in opened.directions] == ["MINIMIZE", "MINIMIZE"]
    assert opened.user_attrs["base_refusals"] == 5
    assert [trial.state for trial in opened.trials] == [TrialState.COMPLETE] * 5
    for trial in opened.trials:
        attributes = trial.user_attrs
        assert type(attributes["refusals"]) is int and 0 <= attributes["refusals"] <= 5
        assert type(attributes["kl_divergence"]) is float and attributes["kl_divergence"] >= 0
        assert attributes["direction_index"] is None or 0 <= attributes["direction_index"] <= 0.9
        assert (attributes["direction_index"] is None) == (trial.params["direction_scope"] == "per layer")
        assert set(attributes["parameters"]) == {"attn.o_proj", "mlp.down_proj"}
        for component, values in attributes["parameters"].items():
            assert set(values) == {"max_weight", "max_weight_position", "min_weight", "min_weight_distance"}
            assert values["max_weight"] == trial.params[f"{component}.max_weight"]
            assert values["max_weight_position"] == trial.params[f"{component}.max_weight_position"]
            assert values["min_weight"] == pytest.approx(trial.params[f"{component}.min_weight"] * values["max_weight"])
    assert opened.trials_dataframe().shape[0] == 5


# What it survives


def test_a_torn_last_line_costs_at_most_that_line(heretic: Heretic, workplace: Path) -> None:
    assert heretic("--no-report", "--n-trials", "4", "--trials-per-batch", "1", "--n-finalists", "0").code == 0
    whole = JOURNAL.read_bytes()
    all_parameters = parameters()
    last = len(whole.splitlines(keepends=True)[-1])
    for lost in (1, 2, last // 2, last - 1):
        JOURNAL.write_bytes(whole[:-lost])
        outcome = heretic("--no-report", "--n-trials", "4")
        assert outcome.code == 0
        assert (
            f"Warning: The last line of {JOURNAL} is incomplete and was removed ({last - lost} bytes); all lines before it are kept."
        ) in outcome.out
        assert "Search: 4 trials, 3 done" in outcome.out
        assert parameters() == all_parameters, "the trial whose end is lost is drawn again, and is the same"


def test_a_journal_cut_anywhere_opens_without_its_last_line(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    whole = JOURNAL.read_bytes()
    settings = load_settings([])
    for size in {*range(len(whole) - 400, len(whole)), *range(0, len(whole), 97)}:
        JOURNAL.write_bytes(whole[:size])
        with Checkpoint(settings) as checkpoint:
            kept = whole[: whole.rfind(b"\n", 0, size) + 1]
            assert checkpoint.lost_bytes == size - len(kept)
            assert (checkpoint.found is not None) == bool(kept)
        assert JOURNAL.read_bytes() == kept


def test_a_last_line_of_rubbish_is_lost_alone(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    for rubbish in (b"\0" * 100, b"\0" * 100 + b"\n", b'{"op_code": 4, "wor\n', b"\xff\xfe\n"):
        with JOURNAL.open("ab") as file:
            file.write(rubbish)
        outcome = heretic()
        assert outcome.code == 0
        assert f"was removed ({len(rubbish)} bytes); all lines before it are kept." in outcome.out
        assert "3 trials done" in outcome.out


def test_a_damaged_line_in_the_middle_is_an_error(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    whole = JOURNAL.read_bytes()
    lines = whole.splitlines(keepends=True)
    for line in (lines[9][: len(lines[9]) // 2] + b"\n", b"\n", b"5\n", b"[]\n", b"{}\n", b"\xff\n", b'{"op_code": 99}\n', b"null\n"):
        damaged = b"".join([*lines[:9], line, *lines[10:]])
        JOURNAL.write_bytes(damaged)
        outcome = heretic()
        assert outcome.code == 1, line
        reason = "Should not reach" if line == b'{"op_code": 99}\n' else "line 10 is not a record"
        assert outcome.err == (
            f"Error: The study {JOURNAL} is damaged: {reason}. Replace it with an intact copy, or start over with --checkpoint-action "
            "restart (the file is kept).\n"
        )
        assert JOURNAL.read_bytes() == damaged, "nothing is thrown away"
    outcome = heretic("--checkpoint-action", "restart")
    assert outcome.code == 0
    assert JOURNAL.with_name("m.jsonl.old").read_bytes() == damaged


def test_a_trial_without_its_score_is_an_error(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    lines = JOURNAL.read_text().splitlines(keepends=True)
    for name in ("refusals", "kl_divergence", "direction_index", "parameters"):
        number = next(i for i, line in enumerate(lines) if f'{{"{name}":' in line)
        JOURNAL.write_text("".join([*lines[:number], *lines[number + 1 :]]))
        outcome = heretic()
        assert outcome.code == 1
        assert outcome.err.startswith(f"Error: The study {JOURNAL} is damaged: trial 0 has no {name}. Replace it with an intact copy")
    JOURNAL.write_text("".join(lines).replace('"early_response_classes"', '"others"'))
    told = "its finalists.base: it has neither response classes nor a failure"
    assert heretic().err.startswith(f"Error: The study {JOURNAL} is damaged: {told}. Replace it with an intact copy")


@pytest.fixture
def small_disk(workplace: Path) -> Iterator[Path]:
    """A file system of 24 KiB, if the system lets us create one."""
    disk = workplace / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "none", disk], check=False)
    if not mounted or mounted.returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_nothing_that_was_finished(heretic: Heretic, small_disk: Path) -> None:
    arguments = ["--n-trials", "12", "--trials-per-batch", "1", "--study-checkpoint-dir", str(small_disk)]
    journal = small_disk / "m.jsonl"
    outcome = heretic(*arguments)
    assert (outcome.code, outcome.err) == (
        1,
        f"Error: The study {journal} cannot be written: No space left on device. Free some space, then run the same command again: "
        "it continues from the last finished trial.\n",
    )
    finished = parameters(journal)
    assert 1 <= len(finished) < 12
    assert heretic(*arguments).code == 1
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    outcome = heretic(*arguments)
    assert outcome.code == 0
    others = re.search(r"Warning: (?!\d of \d \w+_evaluation_prompts are among)", outcome.out)
    assert not others, "a write that failed halfway was taken back"
    assert parameters(journal)[: len(finished)] == finished
    assert len(set(parameters(journal))) == 12


def test_a_write_that_fails_halfway_is_taken_back(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> Callable[..., None]:
        def append_logs(self: Any, logs: Any) -> None:
            with Path(path).open("ab") as file:
                file.write(b'{"op_code": 4, "wor')
            raise OSError(28, "No space left on device")

        return append_logs

    assert heretic().code == 0
    content = JOURNAL.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", fail(str(JOURNAL)))
        assert heretic("--n-trials", "4").code == 1
    assert JOURNAL.read_bytes() == content
    assert heretic("--n-trials", "4").code == 0


def test_a_folder_that_cannot_be_written(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--study-checkpoint-dir", "good.txt/studies")
    assert (outcome.code, outcome.err) == (
        1,
        "Error: The study good.txt/studies/m.jsonl cannot be written: Not a directory. Make it writable or set another "
        "--study-checkpoint-dir, then run the same command again: it continues from the last finished trial.\n",
    )


def test_one_process_at_a_time(heretic: Heretic, workplace: Path) -> None:
    with Checkpoint(load_settings([])):
        outcome = heretic()
        assert (outcome.code, outcome.err) == (
            1,
            f"Error: Another process is working on the study {JOURNAL}. Wait for it, or use another --study-checkpoint-dir.\n",
        )
    assert heretic().code == 0


# Failed trials


def failing(monkeypatch: pytest.MonkeyPatch, which: Callable[[int], bool]) -> None:
    """Let the trials fail whose place in the order of scoring `which` picks."""
    score_trials = Evaluator.score_trials
    n_scored = 0

    def wrapped(self: Evaluator, ablations: Any, *rest: Any) -> Any:
        nonlocal n_scored
        results = list(score_trials(self, ablations, *rest))
        for i in range(len(results)):
            if which(n_scored + i):
                results[i] = TrialError("not finite")
        n_scored += len(results)
        return results

    monkeypatch.setattr(Evaluator, "score_trials", wrapped)


def test_a_failed_trial_is_recorded_and_the_study_goes_on(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda i: i == 1)
    outcome = heretic("--n-trials", "4")
    assert outcome.code == 0
    assert "Warning: Trial 1 failed: TrialError: not finite" in outcome.out
    assert [trial.state.name for trial in study().trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study().trials[1].user_attrs["failure"] == "TrialError: not finite"
    assert "Search" not in heretic("--n-trials", "4").out, "it is not tried again"


def test_a_study_of_which_every_trial_failed(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda i: True)
    for _ in range(2):
        outcome = heretic()
        assert (outcome.code, outcome.err) == (1, "Error: No trial could be scored: all 3 failed. The last one: TrialError: not finite\n")
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert heretic("--n-additional-trials", "2").code == 0


# Which study it is


def test_restart_keeps_every_old_file(heretic: Heretic, workplace: Path) -> None:
    contents = []
    for seed in (1, 2, 3):
        assert heretic("--seed", seed, "--checkpoint-action", "restart").code == 0
        contents.append(JOURNAL.read_bytes())
    names = ["m.jsonl.old", "m.jsonl.old2", "m.jsonl"]
    assert [JOURNAL.with_name(name).read_bytes() for name in names] == contents
    assert heretic("--checkpoint-action", "continue").code == 0
    assert JOURNAL.read_bytes() == contents[-1]
    assert heretic("--checkpoint-action", "continue", "--study-checkpoint-dir", "new").code == 0


def test_flags_given_now_win_and_stored_settings_stay(heretic: Heretic, workplace: Path) -> None:
    assert heretic("--seed", "7", "--max-batch-size", "3").code == 0
    Path("config.toml").unlink()
    outcome = heretic("m", "--n-trials", "5")
    assert outcome.code == 0
    assert "Continuing the study checkpoints/m.jsonl (3 trials done)." in outcome.out
    assert "Seed 7;" in outcome.out
    assert "Search: 5 trials, 3 done" in outcome.out
    with Checkpoint(load_settings(["m", "--max-batch-size", "5"])) as checkpoint:
        restored = checkpoint.restored(load_settings(["m", "--max-batch-size", "5"]))
    assert (restored.max_batch_size, restored.seed, restored.max_response_length) == (5, 7, 4)
    assert restored.refusal_markers == ["a"]


def test_another_rule_is_another_study(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    outcome = heretic("--refusal-rule", "learned")
    assert (outcome.code, outcome.err) == (1, ANOTHER.format(JOURNAL, "refusal_rule was 'markers' and is now 'learned'"))


def test_how_many_trials_there_shall_be(heretic: Heretic, workplace: Path) -> None:
    def searched(*arguments: object) -> list[str]:
        outcome = heretic(*arguments)
        assert outcome.code == 0, outcome.err
        return re.findall(r"Search: (.+)", outcome.out)

    assert searched() == ["3 trials, 0 done"]
    assert searched("--n-trials", "4") == ["4 trials, 3 done"]
    assert searched() == [], "done"
    assert searched("--n-additional-trials", "2") == ["6 trials, 4 done"]
    assert searched("--n-trials", "3") == searched("--n-trials", "2") == []
    Path("config.toml").unlink()
    assert searched("m") == []
    outcome = heretic("m", "--n-trials", "1")
    assert (outcome.code, outcome.err) == (
        2,
        f"Error: The given settings do not fit those stored in {JOURNAL}: n_startup_trials (2) is larger than n_trials (1); decrease "
        "the first or increase the second.\n",
    )


def test_fewer_trials_than_before_are_enough_when_asked_for(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("heretic.reporting.study_view.StudyView.show", interrupt)
        assert heretic("--n-trials", "50", "--trials-per-batch", "1").code == 130
    assert "Search: 3 trials, 1 done" in heretic("--n-trials", "3").out


def test_a_study_of_other_settings_says_which_differ(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    before = JOURNAL.read_bytes()

    def told(*arguments: str) -> str:
        outcome = heretic(*arguments)
        assert outcome.code == 1
        assert JOURNAL.read_bytes() == before
        return outcome.err

    assert told("--max-response-length", "5", "--system-prompt", "Be brief.") == ANOTHER.format(
        JOURNAL,
        "max_response_length was 4 and is now 5; system_prompt was 'You are a helpful assistant.' and is now 'Be brief.'",
    )
    assert told("--bad-prompts.dataset", "good.txt") == ANOTHER.format(
        JOURNAL, 'bad_prompts was {"dataset": "bad.txt"} and is now {"dataset": "good.txt"}'
    )
    assert told("--row-normalization", "full") == ANOTHER.format(JOURNAL, "row_normalization was 'none' and is now 'full'")
    # A mistyped path is told as such, not as other prompts than the study's.
    Path("data.csv").touch()
    assert told("--bad-prompts.dataset", "no.txt") == "Error: bad_prompts: the file or folder no.txt does not exist. Check the path.\n"
    assert told("--good-evaluation-prompts.dataset", "data.csv") == (
        "Error: good_evaluation_prompts: data.csv is a data file; use its folder, with split and column, or a text file.\n"
    )


def test_a_study_of_other_prompts_says_so(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    Path("bad.txt").write_text("something else\n")
    outcome = heretic()
    assert (outcome.code, outcome.err) == (
        1,
        ANOTHER.format(JOURNAL, "the contents of bad_prompts have changed; the contents of bad_evaluation_prompts have changed"),
    )


def test_a_study_of_another_model_says_so(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    shutil.rmtree("m")
    tiny.save(Path("m"), tiny.build(seed=1))  # the same sizes, other weights
    outcome = heretic("--n-trials", "4")
    assert (outcome.code, outcome.err) == (1, ANOTHER.format(JOURNAL, "the contents of the model have changed"))
    # Two names that lead to the same file.
    shutil.copytree("m", "a/b")
    shutil.copytree("m", "a--b")
    assert heretic("--model", "a/b").code == 0
    outcome = heretic("--model", "a--b")
    assert (outcome.code, outcome.err) == (1, ANOTHER.format("checkpoints/a--b.jsonl", "model was 'a/b' and is now 'a--b'"))


def test_a_journal_of_another_program(heretic: Heretic, workplace: Path) -> None:
    JOURNAL.parent.mkdir()
    storage = JournalStorage(JournalFileBackend(str(JOURNAL)))
    foreign = optuna.create_study(storage=storage, study_name="heretic", directions=["minimize", "minimize"])
    foreign.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 0.0), n_trials=1)
    outcome = heretic()
    assert (outcome.code, outcome.err) == (
        1,
        f"Error: The study {JOURNAL} was not created by heretic. Start over with --checkpoint-action restart (the file is kept).\n",
    )
    assert heretic("--checkpoint-action", "restart").code == 0
    assert len(study(JOURNAL.with_name("m.jsonl.old")).trials) == 1


def test_a_journal_without_a_finished_trial_is_begun_anew(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "score_trials", interrupt)
        assert heretic().code == 130
    assert JOURNAL.exists()
    outcome = heretic("--max-response-length", "5")  # nothing is done yet, so nothing must agree
    assert outcome.code == 0
    assert "Continuing" not in outcome.out
    assert sorted(path.name for path in JOURNAL.parent.iterdir() if path.suffix != ".lock") == ["m.jsonl", "m.report.html"]


def test_stored_settings_that_this_version_does_not_take(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    lines = JOURNAL.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if '"settings"' in line)
    entry = json.loads(lines[number])
    entry["user_attr"]["settings"]["max_response_length"] = 0
    JOURNAL.write_text("\n".join([*lines[:number], json.dumps(entry), *lines[number + 1 :], ""]))
    outcome = heretic()
    assert (outcome.code, outcome.err) == (
        1,
        f"Error: The settings stored in {JOURNAL} are not valid in this version: max_response_length: Input should be greater than or "
        "equal to 1. Start over with --checkpoint-action restart (the file is kept).\n",
    )


def test_a_checkpoint_lets_go_of_the_study_when_it_cannot_be_opened(workplace: Path) -> None:
    JOURNAL.parent.mkdir()
    JOURNAL.write_text("rubbish\n" * 3)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="damaged: line 1 is not a record"), Checkpoint(load_settings([])):
            pass


def test_more_trials_than_anybody_waits_for(heretic: Heretic, workplace: Path) -> None:
    assert heretic().code == 0
    with Checkpoint(load_settings([])) as checkpoint:
        checkpoint.note(target=2_000_000)  # as --n-trials 2000000 does, meant to be stopped at some time
    outcome = heretic("--n-trials", "4")
    assert (outcome.code, outcome.err) == (0, "")


def test_a_larger_number_of_trials_makes_no_more_of_them_random(heretic: Heretic, workplace: Path) -> None:
    config = Path("config.toml")
    config.write_text(config.read_text().replace("n_trials = 3\nn_startup_trials = 2\n", ""))
    assert heretic("--n-trials", "10", "--n-finalists", "0").code == 0

    def n_startup_trials(*arguments: str) -> int:
        given = load_settings(arguments)
        with Checkpoint(given) as checkpoint:
            return checkpoint.restored(given).n_startup_trials

    assert n_startup_trials() == n_startup_trials("--n-trials", "100") == 3
    assert n_startup_trials("--n-trials", "5") == 1
    assert n_startup_trials("--n-trials", "100", "--n-startup-trials", "40") == 40


def test_learning_alone_does_not_decide_how_many_trials_share_a_pass(workplace: Path) -> None:
    settings = Settings(model="m", n_trials=0)
    with Checkpoint(settings) as checkpoint:
        checkpoint.create(settings, {})
        assert checkpoint.trials_per_batch(settings, 1) == 1
        assert checkpoint.trials_per_batch(Settings(model="m"), 16) == checkpoint.trials_per_batch(settings, 1) == 16


def test_additional_trials_are_kept_while_edits_are_learned(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heretic.commands.run.learn_with_messages", interrupt)
    assert heretic("--n-additional-trials", "2").code == 130
    assert study().user_attrs["target"] == 5


def test_restart_keeps_what_is_left_of_a_deleted_study(heretic: Heretic, workplace: Path) -> None:
    """Learned edits of a journal that was renamed earlier and then deleted."""
    assert heretic().code == 0
    for folder, name in (("m.jsonl.artifacts", "mine"), ("m.jsonl.old.artifacts", "left")):
        JOURNAL.with_name(folder).mkdir()
        JOURNAL.with_name(folder).joinpath(name).touch()
    outcome = heretic("--checkpoint-action", "restart")
    assert (outcome.code, outcome.err) == (0, "")
    names = ["m.jsonl.old.artifacts/left", "m.jsonl.old2", "m.jsonl.old2.artifacts/mine"]
    assert all(JOURNAL.with_name(name.partition("/")[0]).joinpath(*name.split("/")[1:]).exists() for name in names)
