"""Workers as real processes: killed, hung, interrupted, late, on a journal file and on PostgreSQL. Nothing is lost, nobody is left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

import postgres
import process
import tiny
from conftest import Outcome
from heretic.privacy import shown_location
from heretic.sharing.shared_study import open_study
from heretic.sharing.storage import worker_identity
from heretic.study.front import is_counted
from test_resume import complete, wait_for
from test_shared_search import as_optuna_reads, check_whole

OUTPUT = Path("output.txt")
DEMO_JOURNAL = Path("checkpoints/heretic-demo.jsonl")
FEWER = [f"--{kind}prompts.split=[:40]" for kind in ("good-", "bad-", "good-evaluation-", "bad-evaluation-")]
ATTRIBUTES = {"refusals", "kl_divergence", "direction_index", "parameters"}

Start = Callable[[list[str]], int]

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come. {OUTPUT.read_text() if OUTPUT.exists() else ''}"
        time.sleep(0.05)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the command with its output in `OUTPUT`; what a failed test leaves running is ended."""
    started: list[psutil.Process] = []

    def start(arguments: list[str]) -> int:
        OUTPUT.write_text("")
        pid = process.start(arguments, str(OUTPUT))
        started.append(psutil.Process(pid))
        return pid

    yield start
    for parent in started:
        if parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            parent.kill()  # its workers leave by themselves


def workers_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children()
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "--supervised" in child.cmdline()]


def names_of(processes: list[psutil.Process]) -> set[str]:
    return {f"{worker_identity().rpartition(':')[0]}:{child.pid}" for child in processes}


def at_work(trials: list[FrozenTrial]) -> set[str]:
    return {trial.system_attrs["worker"] for trial in trials if trial.state == TrialState.RUNNING and "worker" in trial.system_attrs}


def nobody_is_left(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def check_study(trials: list[FrozenTrial], n_trials: int) -> None:
    check_whole(trials, n_trials)
    for trial in trials:
        if is_counted(trial):
            assert trial.state == TrialState.COMPLETE
            assert trial.user_attrs.keys() >= ATTRIBUTES


def start_worker(*arguments: str, output: str = "late.txt") -> "subprocess.Popen[bytes]":
    with Path(output).open("w") as file:
        return subprocess.Popen([sys.executable, "-m", "heretic", "worker", *arguments], stdout=file, stderr=file, stdin=subprocess.DEVNULL)


def test_one_worker_is_killed_and_another_joins_late(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pid = start(["--demo", "--seed", "1", "--workers", "2", "--n-trials", "1000", *FEWER])
    wait_for("\nTrial ", 2)
    late = start_worker("--study-storage", str(DEMO_JOURNAL))
    seen = workers_of(pid)
    assert len(seen) == 2
    wait_until(lambda: bool(at_work(as_optuna_reads(DEMO_JOURNAL)) & names_of(seen)), "a trial")
    before = complete(DEMO_JOURNAL)
    victim = next(child for child in seen if names_of([child]) & at_work(as_optuna_reads(DEMO_JOURNAL)))
    victim.send_signal(signal.SIGKILL)
    wait_until(lambda: len(workers_of(pid)) == 2 and victim not in workers_of(pid), "a new worker")
    seen += workers_of(pid)
    newcomers = names_of(workers_of(pid)) - names_of([victim]) | {f"{worker_identity().rpartition(':')[0]}:{late.pid}"}
    wait_until(lambda: newcomers <= {t.system_attrs["worker"] for t in as_optuna_reads(DEMO_JOURNAL) if is_counted(t)}, "trials by all")
    study = open_study(str(DEMO_JOURNAL), "heretic", 60)
    n_trials = len(as_optuna_reads(DEMO_JOURNAL)) + 15  # more than are done until the workers read it
    study.set_user_attr("target", n_trials)  # as "run more trials" does
    assert process.wait(pid) == 0, OUTPUT.read_text()
    assert late.wait(60) == 0, Path("late.txt").read_text()
    nobody_is_left([*seen, *([psutil.Process(late.pid)] if psutil.pid_exists(late.pid) else [])])

    text = OUTPUT.read_text()
    assert re.search(r"Worker \d was ended by signal 9 \(SIGKILL\)\. Its trials are reassigned, and it is restarted\.", text)
    assert "Traceback" not in text and "Error" not in text
    assert f"\n{n_trials} trials done\n" in text and f"\nTrial {n_trials}/1000: " in text, re.findall(r".*trials done.*", text)
    trials = as_optuna_reads(DEMO_JOURNAL)
    check_study(trials, n_trials)
    by_number = {trial.number: trial for trial in trials}
    assert all(by_number[trial.number].values == trial.values for trial in before)
    assert "Waiting" not in Path("late.txt").read_text()
    lost = [trial for trial in trials if not is_counted(trial) and "withdrawn" not in trial.system_attrs]
    for trial in lost:
        again = [other for other in trials if trial.number in other.system_attrs.get("retry_history", [])]
        drawn = trial.params.items()  # perhaps not to the end
        assert [other.params.items() >= drawn for other in again if is_counted(other)] == [True]
    assert len({json.dumps(trial.user_attrs["parameters"]) for trial in trials if is_counted(trial)}) == n_trials


@pytest.fixture
def server() -> Iterator[postgres.Server]:
    server = postgres.Server()
    try:
        server.start()
        yield server
    finally:
        server.remove()


def test_two_workers_on_postgresql_whose_server_is_restarted(
    start: Start, server: postgres.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heretic: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    n_trials = 30
    monkeypatch.setenv("HERETIC_STUDY_STORAGE", server.url)
    pid = start(["--demo", "--seed", "1", "--workers", "2", "--n-trials", str(n_trials), *FEWER])
    wait_for("\nTrial ", 8)
    children = workers_of(pid)
    server.stop()
    wait_for(f"The study {shown_location(server.url)} cannot be reached; retrying: ")
    assert len(workers_of(pid)) == 2, OUTPUT.read_text()
    server.start()
    assert process.wait(pid) == 0, OUTPUT.read_text()
    nobody_is_left(children)
    text = OUTPUT.read_text()
    assert f"The study {shown_location(server.url)} cannot be reached; retrying: " in text
    assert f"The study {shown_location(server.url)} can be reached again." in text
    assert "Traceback" not in text and "Error" not in text
    assert {path.name for path in Path("checkpoints").iterdir()} <= {"heretic-demo.report.html"}, "the study is in the database"
    storage = RDBStorage(server.url.replace("postgresql:", "postgresql+psycopg:"))
    trials = optuna.load_study(study_name="heretic", storage=storage).trials
    check_study(trials, n_trials)
    assert {trial.system_attrs["worker"] for trial in trials} == names_of(children)

    # The same storage holds other studies, and says what is not one.
    outcome = heretic("worker", "--study-name", "other")
    shown = shown_location(server.url)
    expected = f"Error: There is no study 'other' in {shown}. Create it with heretic MODEL --study-storage, then let workers join.\n"
    assert (outcome.code, outcome.err) == (1, expected)
    outcome = heretic("--demo", "--max-response-length", "3", *FEWER)
    reason = "max_response_length was 100 and is now 3"
    expected = f"Error: The study 'heretic' in {shown} does not match this run: {reason}. Use another --study-name.\n"
    assert (outcome.code, outcome.err) == (1, expected)


def test_ctrl_c_reaches_the_workers_and_a_lost_parent_takes_them_along(start: Start, unhurried: Path) -> None:
    journal = Path("checkpoints/m.jsonl")
    pid = start(["--workers", "2"])
    wait_for("\nTrial ", 2)
    children = workers_of(pid)
    os.kill(pid, signal.SIGINT)
    assert process.wait(pid) == 0
    nobody_is_left(children)
    assert "Stopping after the running trials. Press Ctrl+C again to leave at once." in OUTPUT.read_text()
    trials = as_optuna_reads(journal)
    n_done = sum(map(is_counted, trials))
    check_study(trials, n_done)

    # Without --workers the study goes on in one process, as one of several; a parent that is killed takes its workers along.
    pid = start(["--workers", "2"])
    wait_for("\nTrial ", 1)
    children = workers_of(pid)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(pid) == -signal.SIGKILL
    nobody_is_left(children)
    n_done = sum(map(is_counted, as_optuna_reads(journal)))
    assert process.wait(start(["--n-trials", str(n_done + 6)])) == 0, OUTPUT.read_text()
    check_study(as_optuna_reads(journal), n_done + 6)


def test_a_worker_that_hangs_is_killed_and_its_trials_are_tried_again(start: Start, unhurried: Path) -> None:
    journal = Path("checkpoints/m.jsonl")
    pid = start(["--workers", "2", "--worker-timeout", "5", "--n-trials", "30"])
    wait_for("\nTrial ", 2)
    children = workers_of(pid)

    def one_at_work() -> list[psutil.Process]:
        return [child for child in children if names_of([child]) & at_work(as_optuna_reads(journal))]

    victims: list[psutil.Process] = []
    wait_until(lambda: bool(victims.extend(one_at_work()) or victims), "a trial")
    victims[0].send_signal(signal.SIGSTOP)
    children += workers_of(pid)
    assert process.wait(pid) == 0, OUTPUT.read_text()
    nobody_is_left(children)
    check_study(as_optuna_reads(journal), 30)


def test_what_stops_all_workers_is_told_once(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic("--workers", "2", "--refusal-markers", '["a text that nobody says"]')
    assert outcome.code == 1
    assert outcome.err.startswith("Error: The model refuses none of the 5 harmful evaluation prompts, so there is nothing to remove.")
    assert outcome.err.count("Error") == 1


# Joining


def test_a_worker_takes_everything_from_the_study_and_checks_what_is_its_own(
    workplace: Path, heretic: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = ["--study-storage", "shared/s.jsonl", "--study-name", "mine"]
    outcome = heretic(*shared, "--n-trials", 3)
    assert (outcome.code, outcome.err) == (0, "")
    assert "heretic m --study-storage shared/s.jsonl --study-name mine --n-additional-trials 50" in outcome.out
    journal = Path("shared/s.jsonl").absolute()
    study = open_study(str(journal), "mine", 60)
    study.set_user_attr("target", 5)
    assert "shared/s.jsonl" not in json.dumps(study.user_attrs), "the storage's address, which may hold a password, is not stored"

    # Elsewhere: no prompts, no configuration, the model in another folder.
    elsewhere = workplace / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree("m", elsewhere / "copy")
    monkeypatch.chdir(elsewhere)
    there = ["worker", "--study-storage", str(journal), "--study-name", "mine"]
    outcome = heretic(*there)
    assert (outcome.code, outcome.err) == (
        1,
        "Error: The model m is not a local folder, not in the cache, and the hub cannot be reached. "
        "Check the name, the network, and HF_ENDPOINT or HF_HUB_OFFLINE if they are set.\n",
    )
    outcome = heretic(*there, "--model", "copy")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Search: 5 trials, 3 done" in outcome.out and "Trial 5/5: " in outcome.out
    check_study(study.trials, 5)

    study.set_user_attr("target", 6)
    other = tiny.build(seed=9)
    tiny.save(Path("other"), other)
    outcome = heretic(*there, "--model", "other")
    prefix = "Error: This worker's trials could not be compared with the study's: "
    assert (outcome.code, outcome.err) == (1, f"{prefix}the model's file model.safetensors is different here.\n")
    (Path("copy") / "tokenizer_config.json").unlink()
    facts = study.user_attrs["facts"]
    study.set_user_attr("facts", {**facts, "versions": {**facts["versions"], "transformers": "4.0"}})
    outcome = heretic(*there, "--model", "copy")
    import transformers

    here = transformers.__version__
    differences = f"transformers is {here} here and 4.0 there; the model's file tokenizer_config.json is missing here"
    assert (outcome.code, outcome.err) == (1, f"{prefix}{differences}.\n")


def test_what_a_worker_cannot_join(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = heretic("worker")
    assert (outcome.code, outcome.err) == (
        2,
        "Error: heretic worker needs --study-storage, with the URL that the study was created with.\n",
    )
    outcome = heretic("worker", "--study-storag", "x")
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Unknown option --study-storag (did you mean --study-storage?). heretic worker --help lists all options.\n",
    )
    assert heretic().code == 0
    outcome = heretic("worker", "--study-storage", "checkpoints/m.jsonl")
    reason = "was not created for several workers. Create it with --workers or --study-storage."
    expected = f"Error: The study 'heretic' in checkpoints/m.jsonl {reason}\n"
    assert (outcome.code, outcome.err) == (1, expected)
    assert heretic("--study-storage", "checkpoints/m.jsonl", "--n-trials", 4).code == 0
    outcome = heretic("worker", "--study-storage", "checkpoints/m.jsonl", "--batch-size", "many")
    assert outcome.code == 2
    assert outcome.err.startswith("Error: batch_size: Input should be a valid integer")
    shutil.rmtree("checkpoints/m.jsonl.artifacts")
    outcome = heretic("worker", "--study-storage", "checkpoints/m.jsonl")
    assert outcome.code == 1
    assert re.match(r"Error: The directions of the study, artifact [0-9a-f-]+, are not in the storage\.", outcome.err)
    outcome = heretic("--study-storage", "checkpoints/m.jsonl", "--checkpoint-action", "restart")
    expected = "Error: A study in --study-storage cannot be restarted, since workers may be using it. Use another --study-name.\n"
    assert (outcome.code, outcome.err) == (2, expected)


def test_a_models_own_code_is_not_run_because_a_study_says_so(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    assert heretic("--study-storage", "s.jsonl", "--trust-remote-code").code == 0
    config: dict[str, Any] = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    Path("m/own.py").write_text("open('it_ran', 'w')\n")
    outcome = heretic("worker", "--study-storage", "s.jsonl")
    assert outcome.code == 1
    assert "different here" in outcome.err
    assert not Path("it_ran").exists()
