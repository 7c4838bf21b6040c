"""The journal opens in optuna-dashboard as it is: its own command, started on a finished study and asked over HTTP."""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import process
from conftest import Outcome

JOURNAL = Path("checkpoints/m.jsonl")
SECONDS = 120


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=SECONDS) as answer:
        return json.load(answer)


def test_the_dashboard_shows_the_study(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    program = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("optuna-dashboard is not installed")
    assert heretic().code == 0
    content = JOURNAL.read_bytes()
    port = process.free_port()
    server = subprocess.Popen([program, str(JOURNAL), "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.PIPE)
    try:
        api = f"http://127.0.0.1:{port}/api/studies"
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                (study,) = get(api)["study_summaries"]
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline, server.stderr and server.stderr.read()
                time.sleep(0.1)
        shown = get(f"{api}/{study['study_id']}")
    finally:
        server.terminate()
        server.communicate()

    stored = optuna.load_study(study_name="heretic", storage=JournalStorage(JournalFileBackend(str(JOURNAL))))
    assert study["study_name"] == "heretic"
    assert study["directions"] == ["minimize", "minimize"]
    assert [trial["state"] for trial in shown["trials"]] == ["Complete"] * 3
    for trial, own in zip(shown["trials"], stored.trials, strict=True):
        assert trial["number"] == own.number and trial["values"] == own.values
        attributes = {item["key"]: item["value"] for item in trial["user_attrs"]}
        assert json.loads(attributes["refusals"]) == own.user_attrs["refusals"]
        assert float(attributes["kl_divergence"]) == own.user_attrs["kl_divergence"]
        assert {item["name"] for item in trial["params"]} == set(own.params)
    assert JOURNAL.read_bytes() == content, "looking changes nothing"
