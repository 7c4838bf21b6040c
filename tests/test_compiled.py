"""The compiled decode step: the tokens of `generate` under the same edit, and nothing compiled twice."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters

import tiny
from conftest import Outcome
from heretic.decoding import compiled
from heretic.decoding.compiled import CompiledStep, is_supported, rounded_columns, rounded_rows
from heretic.decoding.decoder import Decoder
from heretic.editing.ablation import Ablation, ComponentParameters, LearnedEdit
from heretic.editing.hooks import AblationHooks
from heretic.model import Model
from heretic.prompts import Prompt
from test_accelerator import scores_in

PROMPTS = [Prompt("", text) for text in ("how do i bake bread", "fix my bike", "hello cat", "the dog sat on the mat and the cat ?", "yes")]
NEW_TOKENS = 24


@pytest.fixture(autouse=True)
def no_traces() -> Iterator[None]:
    """pytest captures logs of every level, and PyTorch's of what it compiles take a minute."""
    log = logging.getLogger("torch.__trace")
    before, log.disabled = log.disabled, True
    yield
    log.disabled = before


def searched(strength: float, position: float, distance: float) -> Ablation:
    """An edit of the layers around a position: not of both if the distance is small."""
    kernel = ComponentParameters(strength, position, 0.5 * strength, distance)
    return Ablation(0.4, {"attn.o_proj": kernel, "mlp.down_proj": kernel})


def learned(name: str) -> Ablation:
    """An edit of a single module, and no direction for the others."""
    r = tiny.unit_directions(1, 32, seed=5)[0].float()
    return Ablation(None, {}, LearnedEdit({name: r}, {name: 1.1}))


class Step(CompiledStep):
    """Knows the shapes that it was called with."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shapes: set[torch.Size] = set()

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor, *args: Any) -> torch.Tensor:
        self.shapes.add(mask.shape)
        return super().__call__(tokens, mask, *args)


def load(folder: Path, model_type: str, mode: Any, backend: Any = "eager", **changes: Any) -> tuple[Model, tiny.Recorder]:
    """A model whose decode step is compiled, as far as `backend` does."""
    progress = tiny.Recorder()
    tiny.save(folder, tiny.build(model_type, **changes))
    model: Model = tiny.load(folder, progress, compile_decoding=True)
    model.use_directions(tiny.unit_directions(3, 32).float(), mode)
    assert isinstance(model.decoder, Decoder)
    if model.decoder.compiled is not None:
        model.decoder.compiled = Step(model.model, progress.warning, backend)
    return model, progress


def decoded(model: Model, ablations: list[Ablation]) -> list[list[int]]:
    """Tokens of every row, trial after trial. Some rows end early, so that the others move and the step has fewer rows."""
    rows = model.rows_of(PROMPTS, len(ablations))
    list(model.responses_of_trials(rows, NEW_TOKENS, ablations, is_decided=lambda text: "cat" in text))
    return [row.generated for row in rows]


def by_generate(model: Model, ablations: list[Ablation]) -> list[list[int]]:
    found = []
    for ablation in ablations:
        with model.edited(ablation) as network:
            for row in model.rows_of(PROMPTS, 1):
                ids = torch.tensor([row.tokens])
                output: Any = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS)
                tokens = output[0, len(row.tokens) :].tolist()
                found.append(tokens[: tokens.index(2)] if 2 in tokens else tokens)
    return found


SLOW = pytest.mark.slow
supported = pytest.mark.skipif(not is_supported(), reason=f"compile_decoding has no effect with PyTorch {torch.__version__}")
CASES = [
    ("llama", "full"),
    pytest.param("llama", "none", marks=SLOW),
    pytest.param("gpt2", "full", marks=SLOW),
    pytest.param("mixtral", "full", marks=SLOW),
]


@supported
@pytest.mark.parametrize(("model_type", "mode"), CASES)
def test_tokens_are_those_of_generate_and_nothing_is_compiled_twice(tmp_path: Path, model_type: str, mode: str) -> None:
    model, progress = load(tmp_path / "m", model_type, mode)
    batches = [[searched(0.9, 0.5, 1.0), searched(1.2, 0.0, 0.5)], [searched(1.1, 1.0, 0.4), searched(0.3, 0.2, 1.0)]]
    if mode == "none":
        batches.append([learned(model.architecture.writers[0].name), searched(0.7, 1.0, 0.2)])
    before = counters["stats"]["unique_graphs"]
    for number, ablations in enumerate([*batches, *batches]):
        with dynamo.patch(error_on_recompile=number >= len(batches)):
            found = decoded(model, ablations)
        expected = by_generate(model, ablations)
        assert expected[: len(PROMPTS)] != expected[len(PROMPTS) :]
        assert all(own == whole[: len(own)] for own, whole in zip(found, expected, strict=True))
        assert len({len(own) for own in found}) >= 3
    assert isinstance(model.decoder, Decoder) and isinstance(model.decoder.compiled, Step)
    assert {rows for rows, _ in model.decoder.compiled.shapes} <= {8, 10}  # of ten rows; eight if enough end early
    assert counters["stats"]["unique_graphs"] - before == len(model.decoder.compiled.shapes)
    assert progress.warnings == []


@supported
def test_edits_are_not_forgotten_with_other_directions(tmp_path: Path) -> None:
    """What was compiled for other hooks is not used."""
    model, _ = load(tmp_path, "llama", "none")
    ablations = [searched(1.0, 0.5, 1.0)]
    before = decoded(model, ablations)
    assert model.hooks is not None and isinstance(model.decoder, Decoder)
    model.use_directions(tiny.unit_directions(3, 32, seed=1).float(), "none")
    model.decoder.compiled = CompiledStep(model.model, print, "eager")
    found, expected = decoded(model, ablations), by_generate(model, ablations)
    assert found != before and all(own == whole[: len(own)] for own, whole in zip(found, expected, strict=True))


def test_columns_and_rows_grow_in_steps() -> None:
    assert [rounded_rows(n) for n in (1, 8, 9, 16, 17, 400)] == [8, 8, 16, 16, 32, 512]
    assert [rounded_columns(n) for n in (1, 64, 65, 200)] == [64, 64, 128, 256]


@supported
def test_longer_responses_cross_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COLUMNS", 8)
    monkeypatch.setattr("heretic.decoding.pool.SLACK_COLUMNS", 4)
    monkeypatch.setattr("heretic.decoding.decoder.PADDING_TOKENS", {"cpu": 4})
    model, _ = load(tmp_path, "llama", "none")
    model.decoder.rows_per_trial = 3  # type: ignore[union-attr]
    ablations = [searched(0.9, 0.5, 1.0)]
    found, expected = decoded(model, ablations), by_generate(model, ablations)
    assert all(own == whole[: len(own)] for own, whole in zip(found, expected, strict=True))


@supported
def test_a_step_that_cannot_be_compiled(tmp_path: Path) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise ValueError("no\nway")

    model, progress = load(tmp_path, "llama", "none", fails)
    ablations = [searched(0.9, 0.5, 1.0)]
    found, expected = decoded(model, ablations), by_generate(model, ablations)
    assert all(own == whole[: len(own)] for own, whole in zip(found, expected, strict=True))
    decoded(model, ablations)
    assert progress.warnings == [
        "The decode step of this model could not be compiled (BackendCompilerFailed: backend='fails' raised:). It is run as it is."
    ]


@supported
def test_a_model_whose_step_has_no_fixed_shapes(tmp_path: Path) -> None:
    model, progress = load(tmp_path, "mistral", "none", sliding_window=16)
    assert progress.warnings == [
        "compile_decoding has no effect on this model: it needs SDPA attention without sliding windows, and one device."
    ]
    assert isinstance(model.hooks, AblationHooks) and not model.hooks.is_uniform
    assert isinstance(model.decoder, Decoder) and model.decoder.compiled is None


def test_a_version_that_cannot_compile_for_several_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, *, fullgraph, dynamic, backend: model)
    model, progress = load(tmp_path, "llama", "none")
    assert progress.warnings == [f"compile_decoding has no effect with PyTorch {torch.__version__}: it needs a later version."]
    assert isinstance(model.decoder, Decoder) and model.decoder.compiled is None


@supported
@pytest.mark.slow
def test_a_whole_run(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    """By PyTorch's own compiler: the same scores."""
    for name, options in (("plain", ()), ("compiled", ("--compile-decoding",))):
        outcome = heretic("--study-checkpoint-dir", name, "--trials-per-batch", "2", "--n-finalists", "0", *options)
        assert outcome.code == 0, outcome.out + outcome.err
        assert "could not be compiled" not in outcome.out
    for own, other in zip(scores_in("plain"), scores_in("compiled"), strict=True):
        assert other == pytest.approx(own, rel=1e-4, abs=1e-6)
