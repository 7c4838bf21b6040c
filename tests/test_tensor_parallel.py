"""One copy of a model over two processes that torchrun starts, on the CPU: the scores of one process, the same export."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optuna.trial import FrozenTrial
from safetensors.torch import load_file
from transformers import AutoConfig

import tiny
from conftest import Outcome
from heretic.config import Settings
from heretic.errors import ModelError, UsageError
from heretic.tensor_parallel import agreed, lead, parallel_arguments, whole
from test_shared_search import as_optuna_reads

pytestmark = pytest.mark.filterwarnings("ignore")


def two_processes(*arguments: str) -> "subprocess.CompletedProcess[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "heretic"]
    return subprocess.run([*launcher, *arguments], capture_output=True, text=True, check=False, timeout=150, stdin=subprocess.DEVNULL)


def scores(folder: str) -> list[FrozenTrial]:
    return as_optuna_reads(Path(folder) / "m.jsonl")


def test_two_processes_score_as_one(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    options = ["--row-normalization", "full", "--trials-per-batch", "2", "--max-response-length", "8", "--no-stop-dominated-trials"]
    save = ["--model-action", "save", "--trial-index", "0", "--export-strategy", "merge"]
    alone = heretic(*options, *save, "--save-directory", "alone", "--study-checkpoint-dir", "one")
    assert (alone.code, alone.err) == (0, "")
    result = two_processes(*options, *save, "--save-directory", "together", "--study-checkpoint-dir", "two")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\nTrial 3/3: ") == 1, "one process speaks"
    one, two = scores("one"), scores("two")
    assert [trial.params for trial in two] == [trial.params for trial in one]
    assert [trial.user_attrs["refusals"] for trial in two] == [trial.user_attrs["refusals"] for trial in one]
    divergences = [trial.user_attrs["kl_divergence"] for trial in one]
    assert [trial.user_attrs["kl_divergence"] for trial in two] == pytest.approx(divergences, rel=1e-3)
    assert min(divergences) > 0.01, "the edits do something"
    expected = load_file("alone/model.safetensors")
    for name, weight in load_file("together/model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


def test_what_ends_the_run_is_told_once(workplace: Path) -> None:
    result = two_processes("--refusal-markers", '["a text that nobody says"]')
    assert result.returncode == 1
    assert result.stderr.count("Error: The model refuses none of the 5 harmful evaluation prompts, so there is nothing to remove.") == 1


def test_a_worker_of_two_processes_joins_a_study(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    assert heretic("--study-storage", "s.jsonl", "--n-trials", "2").code == 0
    import optuna

    from heretic.sharing.shared_study import open_study

    study: optuna.Study = open_study("s.jsonl", "heretic", 60)
    study.set_user_attr("target", 4)
    result = two_processes("worker", "--study-storage", "s.jsonl")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Trial 4/4: " in result.stdout
    trials = as_optuna_reads(Path("s.jsonl"))
    assert len(trials) == 4
    assert len({trial.system_attrs["worker"] for trial in trials}) == 2


@pytest.mark.parametrize(
    ("flag", "setting"),
    [
        ("--workers", {"workers": 2}),
        ("--quantization", {"quantization": "bnb_4bit"}),
        ("--device-map", {"device_map": "cpu"}),
        ("--max-memory", {"max_memory": {"cpu": "1GB"}}),
        ("--evaluate-model", {"evaluate_model": "m"}),
    ],
)
def test_what_does_not_go_with_torchrun(flag: str, setting: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(UsageError, match=f"^{flag} cannot be used under torchrun, which spreads one copy of the model over its processes"):
        lead(Settings.model_validate({"model": "m", **setting}), None)


def test_a_type_without_a_plan() -> None:
    config = tiny.build("gpt2").config
    assert isinstance(config, type(AutoConfig.for_model("gpt2")))
    with pytest.raises(ModelError, match="transformers has no tensor-parallel plan for gpt2: run it without torchrun"):
        parallel_arguments(config)


def test_alone_nothing_changes() -> None:
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
    assert agreed(5) == 5
