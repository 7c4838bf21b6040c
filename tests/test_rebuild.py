"""A result made again from its record, and a search run again from it."""

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from conftest import Outcome
from heretic.saving.export import save
from heretic.saving.record import Strategy
from heretic.utils import SilentProgress
from test_export import result_for
from tiny import build, load, settings, unit_directions
from tiny import save as save_original

Heretic = Callable[..., Outcome]
PROMPTS = [
    part
    for name, file in (("good", "good"), ("bad", "bad"), ("good-evaluation", "good"), ("bad-evaluation", "bad"))
    for part in (f"--{name}-prompts.dataset", f"{file}.txt")
]
SAVE = ["--trial-index", 0, "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
NOT_NEXT_TO_IT = (
    "Compared with the record only, since they are not next to it: chat_template.jinja, config.json, generation_config.json, "
    "model.safetensors, tokenizer.json and 1 more"
)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an original `m` and a saved result `out`."""
    monkeypatch.chdir(tmp_path)
    save_original(tmp_path / "m", build("llama", torch.bfloat16))
    return make(tmp_path / "m", tmp_path / "out")


def make(original: Path, target: Path, strategy: Strategy = "merge", size: int = 32, n_layers: int = 2, **changes: Any) -> Path:
    model = load(original, **changes)
    model.use_directions(unit_directions(n_layers + 1, size), changes.get("row_normalization", "none"))
    return save(model, result_for(settings(original, **changes)), strategy, str(target), False, SilentProgress())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forbid_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no model can be loaded, and no prompts."""

    def fail(*arguments: Any, **more: Any) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr("heretic.loading.load._load_weights", fail)
    monkeypatch.setattr("heretic.prompts.load_prompts", fail)


@pytest.mark.parametrize("strategy", ["merge", "adapter"])
@pytest.mark.parametrize("mode", ["none", "pre", "full"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "mixtral"])
def test_the_same_bytes(
    tmp_path: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch, model_type: str, mode: str, strategy: Strategy
) -> None:
    """Norms behind the writers, experts that are stored one by one; every file is the same."""
    original = zoo.build(model_type, max_layers=2) if model_type == "mixtral" else build(model_type)
    save_original(tmp_path / "m", original)
    make(tmp_path / "m", tmp_path / "out", strategy, 64 if model_type == "mixtral" else 32, row_normalization=mode)
    forbid_models(monkeypatch)
    outcome = heretic("--export-from", tmp_path / "out", "--save-directory", tmp_path / "again", "--model", tmp_path / "m")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == f"Rebuilt trial 17 in {tmp_path / 'again'}"
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


@pytest.fixture
def address(saved: Path) -> Iterator[str]:
    """Where a server on this machine has the result."""
    handler = partial(_Quiet, directory=str(saved.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_from_an_address(saved: Path, address: str, heretic: Heretic) -> None:
    outcome = heretic("--export-from", f"{address}/out/heretic.json", "--save-directory", "again")
    assert (outcome.code, outcome.err) == (0, "")
    assert contents(Path("again")) == contents(saved)
    outcome = heretic(f"--reproduce={address}/out/heretic.json")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-2] == NOT_NEXT_TO_IT
    assert outcome.out.splitlines()[-1] == f"{len(contents(saved)) - 1} of {len(contents(saved)) - 1} files are identical."


def test_addresses_that_lead_nowhere(saved: Path, address: str, heretic: Heretic) -> None:
    assert heretic("--reproduce", f"{address}/out").err == f"Error: The URL {address}/out does not end in /heretic.json.\n"
    outcome = heretic("--reproduce", f"{address}/nothing/heretic.json")
    assert (outcome.code, outcome.err) == (
        1,
        f"Error: {address}/nothing/heretic.json cannot be downloaded: HTTP Error 404: File not found\n",
    )
    odd = "http://localhost:x/heretic.json"
    assert heretic("--reproduce", odd) == Outcome(1, "", f"Error: {odd} cannot be downloaded: nonnumeric port: 'x'\n")
    assert heretic("--reproduce", "http://[x/") == Outcome(1, "", "Error: http://[x/ is not a valid URL: Invalid IPv6 URL.\n")


def test_records_that_are_none(saved: Path, heretic: Heretic) -> None:
    outcome = heretic("--export-from", "nowhere", "--save-directory", "again")
    told = "Error: nowhere does not exist. Give a folder that heretic saved, its heretic.json, or the URL of one.\n"
    assert (outcome.code, outcome.err) == (1, told)
    Path("odd.json").write_text('{"model": 1}')
    outcome = heretic("--reproduce", "odd.json")
    assert outcome.err == (
        "Error: odd.json is not a record that a model can be rebuilt from: it lacks settings, trial, versions, export_strategy, files.\n"
    )
    Path("odd.json").write_text("{")
    assert heretic("--reproduce", "odd.json").err.startswith("Error: odd.json cannot be read as a record of heretic: ")
    (saved / "heretic.directions").unlink()
    outcome = heretic("--export-from", "out", "--save-directory", "again")
    assert outcome.err == "Error: out/heretic.directions is missing. It contains the directions and was saved next to heretic.json.\n"
    (saved / "heretic.directions").write_bytes(b"nonsense")
    assert heretic("--export-from", "out", "--save-directory", "again").err.startswith("Error: out/heretic.directions cannot be read: ")
    assert not Path("again").exists()


def test_wrong_usage(saved: Path, heretic: Heretic) -> None:
    assert heretic("--export-from", "out") == Outcome(2, "", "Error: --export-from needs --save-directory.\n")
    outcome = heretic("--export-from", "out", "--save-directory", "again", "--n-trials", "3")
    told = "Error: --n-trials cannot be used with --export-from or --reproduce. heretic --help lists all options.\n"
    assert outcome == Outcome(2, "", told)
    outcome = heretic("--export-from", "out", "--reproduce", "out")
    assert (outcome.code, outcome.err.startswith("Error: Wrong usage: argument --reproduce: not allowed with argument")) == (2, True)
    Path("full").mkdir()
    Path("full", "file").touch()
    outcome = heretic("--export-from", "out", "--save-directory", "full")
    assert outcome.err == "Error: The folder full is not empty. Choose another --save-directory, or add --overwrite.\n"
    for folder, what in (("m", "is the model"), ("out", "is the folder of the record"), (".", "contains the model")):
        outcome = heretic("--export-from", "out", "--overwrite", "--save-directory", folder)
        shown = Path.cwd() if folder == "." else folder
        told = f"Error: {shown} {what}, which must not be replaced. Choose another --save-directory.\n"
        assert (outcome.code, outcome.err) == (1, told)


def test_an_original_elsewhere(saved: Path, heretic: Heretic) -> None:
    shutil.move("m", "moved")
    told = (
        "Error: The original was a folder named m, which does not exist here (records contain no paths). Give the original with --model.\n"
    )
    for arguments in (["--export-from", "out", "--save-directory", "again"], ["--reproduce", "out"], ["--reproduce-search", "out"]):
        assert heretic(*arguments).err.endswith(told)
    outcome = heretic("--export-from", "out", "--save-directory", "again", "--model", "moved")
    assert (outcome.code, outcome.err) == (0, "")
    assert contents(Path("again")) == contents(saved)


def test_another_original(saved: Path, heretic: Heretic) -> None:
    tensors = load_file("m/model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, "m/model.safetensors", {"format": "pt"})
    outcome = heretic("--export-from", "out", "--save-directory", "again")
    told = "Error: m is not the model that was edited (changed: model.safetensors). Give the original with --model.\n"
    assert (outcome.code, outcome.err) == (1, told)


def test_an_original_with_other_settings(saved: Path, heretic: Heretic) -> None:
    config = json.loads(Path("m/generation_config.json").read_text())
    Path("m/generation_config.json").write_text(json.dumps(config))
    outcome = heretic("--reproduce", "out")
    assert outcome.code == 1
    assert "Files of the original have changed, so the rebuilt folder differs as well: generation_config.json" in outcome.out + outcome.err
    assert "Different: generation_config.json (another SHA-256)" in outcome.out
    n = len(contents(saved)) - 1
    assert outcome.out.splitlines()[-1] == f"{n - 1} of {n} files are identical."


def test_a_saved_file_that_was_changed(saved: Path, heretic: Heretic) -> None:
    """The record is still the one of the unchanged file."""
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    outcome = heretic("--reproduce", "out")
    n = len(contents(saved)) - 1
    assert (outcome.code, outcome.err) == (1, "")
    assert outcome.out.splitlines()[-2:] == [
        "Different: model.safetensors (changed since it was saved)",
        f"{n - 1} of {n} files are identical.",
    ]


def test_a_record_without_the_hashes_of_some_files(saved: Path, heretic: Heretic) -> None:
    record = json.loads((saved / "heretic.json").read_text())
    Path("heretic.json").write_text(json.dumps(record | {"files": {"extra.txt": "0"}}))
    shutil.copyfile(saved / "heretic.directions", "heretic.directions")
    outcome = heretic("--reproduce", "heretic.json")
    names = sorted(record["files"].keys() - {"README.md", "kernel.svg"})  # those two are copied from next to the record
    assert (outcome.code, outcome.err) == (1, "")
    assert outcome.out.splitlines()[-len(names) - 3 :] == [
        *(f"Different: {name} ({'missing' if name == 'extra.txt' else 'not in the record'})" for name in sorted([*names, "extra.txt"])),
        NOT_NEXT_TO_IT,
        f"0 of {len(names) + 1} files are identical.",
    ]


def test_the_folder_of_a_gguf_original(saved: Path, heretic: Heretic) -> None:
    Path("models").mkdir()
    Path("models", "my.gguf").write_text("weights")
    outcome = heretic("--export-from", "out", "--model", "models/my.gguf", "--save-directory", "models", "--overwrite")
    told = "Error: models contains the model, which must not be replaced. Choose another --save-directory.\n"
    assert outcome == Outcome(1, "", told)


def test_what_differs_is_listed_with_what_it_means(saved: Path, heretic: Heretic) -> None:
    record = json.loads((saved / "heretic.json").read_text())
    torch_version, threads = record["versions"]["torch"], record["hardware"]["cpu_threads"]
    record["versions"] |= {"torch": "1.0", "optuna": "2.0", "peft": "0.1"}
    record["hardware"] |= {"devices": ["Abacus"], "cpu_threads": 1000}
    record["prompts"]["good_prompts"]["commit"] = "abc"
    (saved / "heretic.json").write_text(json.dumps(record))
    lines = heretic("--reproduce", "out").out.splitlines()
    differing = [line.removeprefix("Different: ") for line in lines if line.startswith("Different: ")]
    assert f"torch: 1.0 then, {torch_version} now (the last digits may differ)" in differing
    assert any(line.startswith("optuna: 2.0 then, ") and line.endswith("a repeated search may propose other trials)") for line in differing)
    assert any(line.startswith("peft: 0.1 then, ") and line.endswith(" now (no effect)") for line in differing)
    assert f"cpu_threads: 1000 then, {threads} now (the last digits may differ)" in differing
    assert any(line.startswith("devices: ['Abacus'] then, ") for line in differing)
    assert not any(line.startswith("good_prompts: ") for line in differing)
    assert any("no commit was recorded" in line for line in differing if line.startswith("bad_prompts: "))


def test_a_search_again(workplace: Path, heretic: Heretic) -> None:
    """With the stored settings and seed, not those that the working directory has meanwhile."""
    assert heretic(*SAVE).code == 0
    with Path("config.toml").open("a") as file:
        file.write("kl_divergence_target = 0.5\n")
    outcome = heretic("--reproduce-search", "out", *PROMPTS)
    assert outcome.code == 0, outcome
    trial = json.loads(Path("out/heretic.json").read_text())["trial"]
    assert outcome.out.splitlines()[-1].startswith(f"Trial {trial['number']} is the same as in the record: ")
    assert list(Path("checkpoints/reproduced").glob("*.jsonl"))


def test_a_search_that_goes_another_way(workplace: Path, heretic: Heretic) -> None:
    assert heretic(*SAVE).code == 0
    number = json.loads(Path("out/heretic.json").read_text())["trial"]["number"]
    outcome = heretic("--reproduce-search", "out", "--seed", "2", *PROMPTS)
    assert outcome.code == 1
    assert f"Different in trial {number}: attn.o_proj.max_weight was " in outcome.out


def test_a_search_without_scores_to_compare(saved: Path, heretic: Heretic) -> None:
    """Told before the search."""
    record = json.loads((saved / "heretic.json").read_text())
    del record["scores"]
    (saved / "heretic.json").write_text(json.dumps(record))
    outcome = heretic("--reproduce-search", "out")
    told = "Error: out/heretic.json is not a record that a search can be compared with: it lacks scores.refusals.\n"
    assert outcome == Outcome(1, "", told)
