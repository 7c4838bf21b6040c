"""Models that memory does not hold: weights offloaded to main memory and disk, and those that only 4 bits make fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from conftest import Outcome
from heretic.config import Settings
from heretic.device import input_device
from heretic.loading.load import load_model
from heretic.loading.source import model_source
from heretic.utils import SilentProgress
from test_shared_search import as_optuna_reads

SAVE = ["--model-action", "save", "--trial-index", "0", "--export-strategy", "merge"]


def placed(settings: Settings) -> tuple[set[str], torch.device]:
    """Devices of a model's weights ("meta": on the disk until they are needed), and where token ids go."""
    model = load_model(settings, model_source(settings), SilentProgress()).model
    return {parameter.device.type for parameter in model.parameters()}, input_device(model)


def run_and_save(heretic: Callable[..., Outcome], name: str, *options: str) -> tuple[list[tuple[int, float]], dict[str, torch.Tensor]]:
    """A study in a folder `name` of its own: its scores, and the weights of the first trial of its front."""
    outcome = heretic(*options, *SAVE, "--save-directory", name, "--study-checkpoint-dir", f"{name}-study")
    assert (outcome.code, outcome.err) == (0, "")
    trials = as_optuna_reads(Path(f"{name}-study/m.jsonl"))
    return [(t.user_attrs["refusals"], t.user_attrs["kl_divergence"]) for t in trials], load_file(f"{name}/model.safetensors")


@pytest.mark.parametrize(
    ("memory", "places"), [("60KB", {"cpu", "meta"}), ("10KB", {"meta"})], ids=["some layers on disk", "all, with the embedding"]
)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_search_and_export_of_an_offloaded_model(
    memory: str, places: set[str], mode: str, workplace: Path, heretic: Callable[..., Outcome]
) -> None:
    limit = {"cpu": memory}
    assert placed(Settings(model="m", max_memory=limit, dtypes=["float32"])) == (places, torch.device("cpu"))
    scores, weights = run_and_save(heretic, "here", "--row-normalization", mode)
    away_scores, away_weights = run_and_save(heretic, "away", "--row-normalization", mode, "--max-memory", json.dumps(limit))
    assert [refusals for refusals, _ in away_scores] == [refusals for refusals, _ in scores]
    assert [kl for _, kl in away_scores] == pytest.approx([kl for _, kl in scores], rel=1e-4)
    assert weights.keys() == away_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(away_weights[name], weight)
    assert not torch.equal(
        weights["model.layers.1.mlp.down_proj.weight"], load_file("m/model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    )


def test_a_containers_limit_is_kept(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate sees only the machine's memory, and the system would kill the process."""
    chosen = Settings(model="m", dtypes=["float32"])
    assert placed(chosen)[0] == {"cpu"}
    monkeypatch.setattr("heretic.loading.load.memory_limits", lambda: [(100_000, 40_000)])
    monkeypatch.setattr("heretic.device.memory_limits", lambda: [(100_000, 40_000)])
    assert placed(chosen)[0] == {"cpu", "meta"}
    assert placed(chosen.model_copy(update={"max_memory": {"cpu": "1GB"}}))[0] == {"cpu"}, "what the user says counts"


def test_a_model_that_fits_only_in_4_bits(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    """Searched and saved within a limit that its 16 or 32 bits exceed; what is saved has the original's format."""
    tiny.save(Path("big"), tiny.build(hidden_size=64, intermediate_size=512, head_dim=16))
    limit = {"cpu": "300KB"}
    full = Settings(model="big", max_memory=limit, dtypes=["float32"])
    assert "meta" in placed(full)[0]
    assert placed(full.model_copy(update={"quantization": "bnb_4bit"}))[0] == {"cpu"}
    options = ["--model", "big", "--quantization", "bnb_4bit", "--max-memory", json.dumps(limit)]
    outcome = heretic(*options, *SAVE, "--save-directory", "edited")
    assert outcome.code == 0, outcome.err
    original, edited = load_file("big/model.safetensors"), load_file("edited/model.safetensors")
    changed = {name for name in original if not torch.equal(original[name], edited[name])}
    assert changed and all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    assert {tensor.dtype for tensor in edited.values()} == {torch.float32}
    # An edit has rank one: what the search computed in 4 bits is applied to the weights as they are.
    for name in changed:
        values = torch.linalg.svdvals((edited[name] - original[name]).double())
        assert values[1] < 1e-4 * values[0]
