"""Every type of decoder that transformers can build: what writes to its stream is found, edited, exported and loaded again.

The independent answers: the explicit edit of every matrix in float64, and the stream itself, which carries nothing of a direction
that every writer has lost.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import parse
from torch import Tensor
from transformers import GenerationConfig

import tiny
import zoo
from conftest import Outcome
from heretic.decoding.rows import Row
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.editing.architecture import Architecture
from heretic.editing.completeness import remainder
from heretic.editing.discovery import discover
from heretic.editing.hooks import AblationHooks, batches_trials
from heretic.editing.probe import probe_tokens
from heretic.errors import UnsupportedModelError
from heretic.loading.load import LoadedModel, auto_class, load_config, refuse_encoder_decoder
from heretic.loading.source import model_source
from heretic.model import Model
from heretic.saving.export import save
from heretic.saving.record import Result
from heretic.utils import SilentProgress
from test_completeness import SAMPLE, check_that_every_writer_counts
from twin import discover_by_twin

MODES = ["none", "pre", "full"]
# Rounding of float32, relative to the largest logit.
ROUNDING = 2e-5


def parameters(strength: float) -> Ablation:
    """Strong in the last layer, weaker in the others, and another direction for every layer."""
    return Ablation(None, dict.fromkeys(("attn.o_proj", "mixer.out_proj", "mlp.down_proj"), ComponentParameters(strength, 1.0, 0.3, 1.5)))


ABLATIONS = [parameters(1.1), parameters(0.6)]


def directions(architecture: Architecture) -> Tensor:
    return tiny.unit_directions(len(architecture.layers) + 1, architecture.hidden_size).float()


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return output.float()


def check_close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max() / expected.abs().max()) < ROUNDING


def explicit(hooks: AblationHooks, writer: Any, ablation: Ablation, mode: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name and edited value, in float64, of each of a writer's parameters."""
    r, strength = hooks.edit_of(writer, ablation)
    storage, module = writer.storage, writer.module
    if storage.bias is not None:
        bias = getattr(module, storage.bias).detach().double().numpy()
        yield storage.bias, np.stack([tiny.explicit_bias(b, r, strength) for b in bias.reshape(-1, len(r))]).reshape(bias.shape)
    if storage.weight is None:
        return
    weight = getattr(module, storage.weight).detach().double().numpy()
    if storage.n_experts is None:
        edited = tiny.explicit_weight(weight if storage.axis == 0 else weight.T, r, strength, mode)
        yield storage.weight, edited if storage.axis == 0 else edited.T
    else:
        shape = weight.shape
        weight = weight.reshape(storage.n_experts, -1, shape[-1])  # some stack their experts' matrices one below the other
        axis = storage.axis + 3 - len(shape)
        stored = [tiny.explicit_weight(W if axis == 1 else W.T, r, strength, mode) for W in weight]
        yield storage.weight, np.stack([W if axis == 1 else W.T for W in stored]).reshape(shape)


@contextmanager
def explicitly_edited(architecture: Architecture, hooks: AblationHooks, ablation: Ablation, mode: str) -> Iterator[dict[str, Tensor]]:
    """Within, the weights themselves are edited; their values by name."""
    kept, values = [], {}
    for writer in architecture.writers:
        for name, value in list(explicit(hooks, writer, ablation, mode)):
            parameter = getattr(writer.module, name)
            kept.append((parameter, parameter.data))
            parameter.data = torch.from_numpy(value).to(parameter.dtype)
            values[f"{writer.name}.{name}"] = parameter.data
    try:
        yield values
    finally:
        for parameter, data in reversed(kept):
            parameter.data = data


def check_edits(model: Any, architecture: Architecture) -> None:
    tokens = torch.randint(6, 30, (4, 9), generator=torch.Generator().manual_seed(0))
    for mode in MODES:
        hooks = AblationHooks(architecture, directions(architecture), mode)  # type: ignore[arg-type]
        expected = []
        for ablation in ABLATIONS:
            with explicitly_edited(architecture, hooks, ablation, mode):
                expected.append(logits(model, tokens))
            with hooks.active([ablation]):
                check_close(logits(model, tokens), expected[-1])
        assert float((expected[0] - expected[1]).abs().max() / expected[0].abs().max()) > 10 * ROUNDING, "the edits show in the logits"
        if batches_trials(architecture, mode):  # type: ignore[arg-type]
            with hooks.active(ABLATIONS):
                trial_of_row = [0, 1, 1, 0]
                hooks.assign_rows(trial_of_row)
                check_close(logits(model, tokens), torch.stack([expected[t][i] for i, t in enumerate(trial_of_row)]))
        hooks.remove()


def load(model_type: str, folder: Path, mode: str) -> Model:
    """A tiny model as the program holds it, from files; its tokenizer is made for no type in particular."""
    original = zoo.build(model_type)
    original.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    with torch.no_grad():  # of all tokens only those that are words are ever the likeliest
        heads = (module for name, module in original.named_modules() if name.endswith("lm_head"))  # some types do not tell
        head = (original.get_output_embeddings() or next(heads)).weight
        head[: len(tiny.SPECIAL)] = head[tiny.SIZES["vocab_size"] :] = 0
        head *= -1  # with the words that rwkv then likes, what it makes of several rows at once can be told from each alone
    tiny.save(folder, original)
    settings = tiny.settings(folder, row_normalization=mode)
    source = model_source(settings)
    config = load_config(source)
    inner = auto_class(config).from_pretrained(folder, dtype="float32").eval()
    inner.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    loaded = LoadedModel(source, inner, tiny.tokenizer(), config, inner.generation_config, torch.float32, torch.float32, False)
    model = Model(loaded, settings)
    model.use_directions(directions(model.architecture), mode)  # type: ignore[arg-type]
    return model


PROMPTS = [[6, 9, 12, 7, 20, 11, 8], [10, 25, 7], [13, 14, 15, 16, 21]]


def check_responses(model: Model, mode: str) -> None:
    """Greedy responses of two trials: every token is the best one, to rounding, for weights that are edited and no cache."""
    trials = range(2 if model.batches_trials else 1)
    rows = [Row(trial, tokens, i) for trial in trials for i, tokens in enumerate(PROMPTS)]
    done = list(model.responses_of_trials(rows, 4, ABLATIONS[: len(trials)]))
    assert len(done) == len(rows)
    assert model.hooks is not None
    for trial in trials:
        with explicitly_edited(model.architecture, model.hooks, ABLATIONS[trial], mode):
            for row in (row for row in done if row.trial == trial):
                answer = [*row.generated, 2] if len(row.generated) < 4 else row.generated
                scores = logits(model.model, torch.tensor([[*row.tokens, *answer]]))[0, len(row.tokens) - 1 : -1]
                chosen = scores.gather(1, torch.tensor(answer)[:, None])[:, 0]
                assert float((scores.max(dim=1).values - chosen).max()) < 1e-3 * float(scores.abs().max())


def check_export(loaded: Model, folder: Path, mode: str) -> None:
    """Through the program's own saving, and back through transformers."""
    settings = tiny.settings(folder / "original", row_normalization=mode)
    result = Result(settings, 0, ABLATIONS[0], refusals=0, kl_divergence=0.0, base_refusals=0, n_bad_prompts=1, response_prefix="")
    target = save(loaded, result, "merge", str(folder / "edited"), False, SilentProgress())
    after = auto_class(loaded.loaded.config).from_pretrained(target, dtype="float32")
    before, tensors = loaded.model.state_dict(), after.state_dict()
    tokens = probe_tokens(after) % 30
    assert loaded.hooks is not None
    with explicitly_edited(loaded.architecture, loaded.hooks, ABLATIONS[0], mode) as values:
        check_close(logits(after, tokens), logits(loaded.model, tokens))
        assert tensors.keys() == before.keys()
        assert values.keys() <= tensors.keys()
        # Tensors under several names (tied) hold what is written to any of them.
        edited = {tensors[name].data_ptr() for name in values}
        for name, tensor in tensors.items():
            if name in values:
                torch.testing.assert_close(tensor, values[name], rtol=1e-5, atol=1e-6)
            elif tensor.data_ptr() not in edited:
                assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("model_type", [t if t in zoo.COMMON else pytest.param(t, marks=pytest.mark.slow) for t in zoo.DECODERS])
def test_decoder(model_type: str, tmp_path: Path) -> None:
    model = zoo.build(model_type)
    architecture = discover(model)
    left = remainder(model, architecture)
    assert left.is_inexact(torch.float32) == (model_type in zoo.INEXACT)
    assert model_type in zoo.INEXACT or not left.is_missed()
    check_edits(model, architecture)
    if model_type not in {*zoo.INEXACT, *SAMPLE}:
        check_that_every_writer_counts(model, [torch.bfloat16])
    loaded = load(model_type, tmp_path / "original", "full")
    if model_type not in zoo.NOT_GENERATED:
        check_responses(loaded, "full")
    check_export(loaded, tmp_path, "full")


@pytest.mark.parametrize("model_type", zoo.ENCODERS)
def test_encoders_are_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        discover(zoo.build(model_type))
    name = model_type
    assert str(caught.value) == (
        f"Models of type {name} are not supported: this is an encoder, in which tokens attend to later ones; only decoders, which generate "
        "text from left to right, can be edited."
    )


@pytest.mark.parametrize("model_type", zoo.ENCODER_DECODERS)
def test_encoders_with_decoders_are_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        refuse_encoder_decoder(zoo.CONFIG_MAPPING[model_type]())
    assert "it is an encoder with a decoder; only decoders that stand alone can be edited." in str(caught.value)


@pytest.mark.parametrize("model_type", zoo.NOT_BUILT)
def test_what_transformers_does_not_build(model_type: str) -> None:
    reason = zoo.NOT_BUILT[model_type].replace("PIL", "(PIL|timm)")  # if PIL is installed (extra research), timm is missing next
    with pytest.raises(Exception, match=reason):
        zoo.build(model_type)


@pytest.mark.parametrize("model_type", zoo.NOT_RUN)
def test_what_does_not_run_on_text(model_type: str) -> None:
    model = zoo.build(model_type)
    with pytest.raises(Exception, match=zoo.NOT_RUN[model_type]):
        discover(model)


def test_every_type_has_its_place() -> None:
    places = [zoo.DECODERS, zoo.ENCODERS, zoo.ENCODER_DECODERS, zoo.NOT_BUILT, zoo.NOT_RUN, zoo.NOT_TEXT]
    assert sorted(t for place in places for t in place) == zoo.TYPES
    assert zoo.INEXACT.keys() <= set(zoo.DECODERS)
    if parse(transformers.__version__) >= parse("5.23"):  # older versions have fewer types
        assert zoo.STALE == [] and len(zoo.DECODERS) >= 200


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("qwen3_moe", {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048}),
        ("gpt_oss", {"num_hidden_layers": 36, "num_local_experts": 128}),
        ("llama", {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64}),
    ],
)
def test_a_model_that_is_too_large_to_run_is_found_by_its_twin(model_type: str, sizes: dict[str, int]) -> None:
    config = zoo.CONFIG_MAPPING[model_type](**sizes)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    found = discover_by_twin(model)
    names = [(w.name, w.layer, w.component, w.storage.weight, w.storage.axis, w.storage.bias) for w in found.writers]
    small = discover(zoo.build(model_type, max_layers=2))
    expected = {(w.name, w.component, w.storage.weight, w.storage.axis, w.storage.bias) for w in small.writers if w.layer == 0}
    assert {(name, *rest) for name, layer, *rest in names if layer == 0} == expected
    assert len(found.layers) == sizes["num_hidden_layers"] and len(names) == len(expected) * len(found.layers)
    for writer in found.writers:
        weight = getattr(writer.module, writer.storage.weight or "")
        assert weight.is_meta and weight.shape[writer.storage.axis] == found.hidden_size
        assert writer.storage.n_experts in (None, sizes.get("num_experts") or sizes.get("num_local_experts"))
    assert found.components["mlp.down_proj"] == len(found.layers) * (sizes.get("num_experts") or sizes.get("num_local_experts") or 1)


def whole_run(heretic: Callable[..., Outcome], folder: Path, model_type: str, mode: str, *more: object) -> Outcome:
    original = zoo.build(model_type)
    original.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    with torch.no_grad():  # of all tokens only those that are words are ever the likeliest
        heads = (module for name, module in original.named_modules() if name.endswith("lm_head"))  # some types do not tell
        head = (original.get_output_embeddings() or next(heads)).weight
        head[: len(tiny.SPECIAL)] = head[tiny.SIZES["vocab_size"] :] = 0
        head *= -1  # with the words that rwkv then likes, what it makes of several rows at once can be told from each alone
    tiny.save(folder / "m", original)
    (folder / "good.txt").write_text("how do i bake bread\nfix my bike\nhello cat\nthe dog sat on the mat\n")
    (folder / "bad.txt").write_text("how do i fix bread\nbake my cat\nhello dog on the mat\nsorry\n")
    prompts = [
        f"--{kind}-prompts.dataset={folder / name}.txt"
        for kind, name in (("good", "good"), ("bad", "bad"), ("good-evaluation", "good"), ("bad-evaluation", "bad"))
    ]
    search = ["--n-trials", 3, "--n-startup-trials", 2, "--seed", 1, "--row-normalization", mode, "--max-response-length", 6]
    search += ["--refusal-markers", '["a", "e", "i", "o", "?", "."]']  # in nearly everything that is said at random
    saving = ["--trial-index", 0, "--model-action", "save", "--export-strategy", "merge", "--save-directory", folder / "out"]
    studies = ["--study-checkpoint-dir", folder / "studies"]
    return heretic(folder / "m", *prompts, *search, "--dtypes", "float32", *studies, *saving, *more)


TOGETHER = "Trials are evaluated one at a time: this model's experts do not know which prompt a token belongs to."
GENERATED = "Responses are generated by transformers, {}. Trials take longer."
ALL = "in batches that run until the longest response ends"
ALONE = "one at a time, since this model computes different results in batches"
APART = f"{ALL}, with separate batches for prompts of different lengths, since padding changes this model's results"


@pytest.mark.parametrize(
    ("model_type", "mode", "components", "told"),
    [
        ("mixtral", "full", "4 attn.o_proj, 16 mlp.down_proj", []),
        pytest.param("gpt2", "pre", "4 attn.o_proj, 4 mlp.down_proj", [], marks=pytest.mark.long),
        ("falcon_h1", "none", "4 attn.o_proj, 4 mixer.out_proj, 4 mlp.down_proj", [GENERATED.format(ALL)]),
        pytest.param("mamba2", "full", "4 mixer.out_proj", [GENERATED.format(ALL)], marks=pytest.mark.long),
        ("recurrent_gemma", "full", "1 attn.o_proj, 3 mixer.out_proj, 4 mlp.down_proj", [GENERATED.format(APART)]),
        ("rwkv", "none", "4 attn.o_proj, 4 mlp.down_proj", [GENERATED.format(ALONE)]),
        ("llama4_text", "full", "4 attn.o_proj, 20 mlp.down_proj", [TOGETHER]),
        pytest.param("hy_v4", "full", "3 attn.o_proj, 11 mlp.down_proj", [GENERATED.format(ALL)], marks=pytest.mark.long),
    ],
)
def test_whole_runs(model_type: str, mode: str, components: str, told: list[str], tmp_path: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = whole_run(heretic, tmp_path, model_type, mode)
    lines = [line.strip() for line in outcome.out.splitlines()]
    assert outcome.code == 0, outcome
    assert sum(line.endswith(f"writing to the residual stream: {components}, all edited") for line in lines) == 1
    notes = [TOGETHER, *(GENERATED.format(how) for how in (ALL, ALONE, APART))]
    assert [note for note in notes if note in lines] == told
    assert (tmp_path / "out" / "heretic.json").is_file()


GATES = "gates or scales its residual stream in a way that no edit of weights can reproduce"


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        pytest.param("doge", f"this model {GATES}", marks=pytest.mark.skipif("doge" not in zoo.TYPES, reason="of later versions")),
        ("openai-gpt", f"this model normalizes or {GATES}, or a module that writes to it was not found"),
    ],
)
def test_what_stays_in_the_stream_is_told(model_type: str, why: str, tmp_path: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = whole_run(heretic, tmp_path, model_type, "none")
    lines = " ".join(line.strip() for line in outcome.out.splitlines())
    told = re.search(
        r"Warning: After an ablation at full strength, (\d+)% of what a layer writes along the direction remains in the residual stream: "
        r"(.*?)\. Ablation works on this model, but only approximately\. ",
        lines,
    )
    assert told and 10 < int(told[1]) <= 100, outcome
    assert told[2] == why


def test_experts_may_have_kernels_of_their_own(tmp_path: Path, heretic: Callable[..., Outcome]) -> None:
    outcome = whole_run(heretic, tmp_path, "qwen2_moe", "none", "--split-experts")
    assert outcome.code == 0
    found = "2 attn.o_proj, 8 mlp.experts.down_proj, 2 mlp.shared_experts.down_proj, all edited"
    assert f"writing to the residual stream: {found}" in outcome.out
    parameters = json.loads((tmp_path / "out" / "heretic.json").read_text())["trial"]["parameters"]
    assert parameters.keys() == {"attn.o_proj", "mlp.experts.down_proj", "mlp.shared_experts.down_proj"}
    assert parameters["mlp.experts.down_proj"] != parameters["mlp.shared_experts.down_proj"]
