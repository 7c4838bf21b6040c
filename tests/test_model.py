"""A loaded model at work, against plain transformers: one prompt at a time, no padding, no cache of ours, weights edited by hand."""

import copy
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

import heretic.decoding.decoder
import heretic.editing.hooks
import heretic.loading.load
from heretic.decoding.decoder import Decoder
from heretic.decoding.plain import PlainDecoder
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.editing.completeness import remainder
from heretic.errors import ModelError, PromptError, TrialError, UnsupportedModelError
from heretic.model import Model
from heretic.prompts import Prompt
from tiny import (
    DROPS_SYSTEM_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    TEMPLATE,
    Recorder,
    build,
    explicit_bias,
    explicit_weight,
    load,
    loud,
    save,
    settings,
    tokenizer,
    unit_directions,
)

SYSTEM = "you are helpful"
TEXTS = [
    "how do i bake bread ?",
    "fix my bike",
    "hello",
    "the cat sat on the mat . the dog sat on the cat . the mat sat on the dog .",
    "a dog",
    "how do you fix a cat and a dog and a bike ? how do you bake the bread and the mat ?",
    "yes",
    "no no no no no",
    "sorry . i do not bake bread !",
    "my dog my cat my bike my mat",
]
PROMPTS = [Prompt(SYSTEM if i % 3 else "", text) for i, text in enumerate(TEXTS)]
ALIKE = [Prompt(SYSTEM, text) for text in TEXTS]  # what all begin with is computed once
SETS = {"alike": ALIKE, "mixed": PROMPTS}
FEW = ALIKE[3:8]
LENGTH = 24
# Types whose masks, positions or caches differ.
TYPES = {
    "llama": {},
    "mistral with a sliding window": {"sliding_window": 8},
    "gemma3_text": {"tie_word_embeddings": False, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"tie_word_embeddings": False, "sliding_window": 8},
    "olmo2": {},
    "phi": {},
    "qwen2_5_vl": {},
}


class Plain:
    """The reference: transformers alone, read from the folder anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        vision = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
        self.model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
        self.model.generation_config = GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=0)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.known = {}

    def ids(self, prompt: Prompt) -> Tensor:
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        messages.append({"role": "user", "content": prompt.user})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    @torch.inference_mode()
    def response(self, prompt: Prompt, max_new_tokens: int = LENGTH, skip_special_tokens: bool = True) -> str:
        if (prompt, max_new_tokens) not in self.known:
            ids = self.ids(prompt)
            output = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens)
            self.known[prompt, max_new_tokens] = output[0, ids.shape[1] :]
        return self.tokenizer.decode(self.known[prompt, max_new_tokens], skip_special_tokens=skip_special_tokens)

    @torch.inference_mode()
    def logprobs(self, prompt: Prompt) -> Tensor:
        logits = self.model(self.ids(prompt)).logits[0, -1].double()
        return logits - torch.logsumexp(logits, dim=0)

    @torch.inference_mode()
    def hidden_states(self, prompt: Prompt) -> Tensor:
        """Last position, `(layer + 1, d)`; the last after the final norm."""
        states = self.model(self.ids(prompt), output_hidden_states=True).hidden_states
        return torch.stack([state[0, -1] for state in states])

    def final_norm(self, hidden: Tensor) -> Tensor:
        decoder = self.model.get_decoder()
        with torch.inference_mode():
            return getattr(decoder, "norm", None)(hidden) if hasattr(decoder, "norm") else decoder.final_layernorm(hidden)

    def edited(self, edits: Iterable[tuple[str, Any, float]], mode: str) -> "Plain":
        """A copy in which `edits` of (module's name, direction, strength) were made."""
        other = copy.copy(self)
        other.model, other.known = copy.deepcopy(self.model), {}
        for name, r, strength in edits:
            module = other.model.get_submodule(name)
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(explicit_weight(module.weight, r, strength, mode)))
                if module.bias is not None:
                    module.bias.copy_(torch.from_numpy(explicit_bias(module.bias, r, strength)))
        return other


@pytest.fixture(scope="module", params=TYPES)
def any_plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    name = request.param.partition(" ")[0]
    return Plain(save(tmp_path_factory.mktemp(name), build(name, **TYPES[request.param])))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(save(tmp_path_factory.mktemp("llama"), build("llama", attention_bias=True, mlp_bias=True)))


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """A model whose responses end after anything from no tokens to more than are asked for."""
    model = build("llama", seed=5)
    with torch.no_grad():
        model.lm_head.weight[2] *= 3
    return Plain(save(tmp_path_factory.mktemp("ending"), model))


@pytest.fixture(params=[False, True], ids=["own decoder", "transformers' decoder"])
def either_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(heretic.decoding.decoder, "supports", lambda model: False)


@pytest.mark.parametrize("prompts", SETS.values(), ids=SETS)
@pytest.mark.parametrize("max_batch_size", [3, 128])
def test_residuals(any_plain: Plain, max_batch_size: int, prompts: list[Prompt]) -> None:
    """Equal to the hidden states of each prompt alone, so left padding does not matter; the last before the final norm."""
    model = load(any_plain.folder, max_batch_size=max_batch_size)
    batches = list(model.residuals(prompts))
    assert (len(batches) > 1) == (max_batch_size == 3)
    residuals = torch.cat(batches)
    assert (residuals.shape, residuals.dtype) == ((len(prompts), 3, 32), torch.float32)
    for prompt, residual in zip(prompts, residuals, strict=True):
        expected = any_plain.hidden_states(prompt)
        torch.testing.assert_close(residual[:2], expected[:2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(any_plain.final_norm(residual[2]), expected[2], rtol=1e-4, atol=1e-4)
        assert (residual[2] - expected[2]).abs().max() > 0.1
    assert (residuals[0] - residuals[1]).abs().max() > 0.1


@pytest.mark.parametrize("prompts", SETS.values(), ids=SETS)
@pytest.mark.parametrize("max_batch_size", [3, 128])
def test_first_token_logprobs(any_plain: Plain, max_batch_size: int, prompts: list[Prompt]) -> None:
    model = load(any_plain.folder, max_batch_size=max_batch_size)
    logprobs = model.first_token_logprobs(prompts)
    assert (logprobs.shape, logprobs.dtype) == ((len(prompts), 33), torch.float32)
    expected = torch.stack([any_plain.logprobs(prompt) for prompt in prompts])
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


@pytest.mark.usefixtures("either_decoder")
def test_the_output_weight_is_multiplied_once(plain: Plain) -> None:
    """The last positions of several rows: their input is contiguous, and they are what transformers alone gives."""
    model, seen = load(plain.folder), []
    model.model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
    with torch.inference_mode():
        logits = model.logits_at_end(rows, 3)
        expected = plain.model(torch.tensor(rows)).logits[:, -3:]
    assert seen == [True]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prompts", SETS.values(), ids=SETS)
@pytest.mark.parametrize("max_batch_size", [4, 128])
def test_responses(any_plain: Plain, max_batch_size: int, prompts: list[Prompt]) -> None:
    """Greedy, whatever else is in the batch, whichever rows end early."""
    model = load(any_plain.folder, max_batch_size=max_batch_size)
    expected = [any_plain.response(prompt) for prompt in prompts]
    assert model.responses(prompts, LENGTH) == expected
    assert len(set(expected)) > len(expected) // 2


@pytest.mark.usefixtures("either_decoder")
def test_responses_that_end(ending: Plain) -> None:
    model = load(ending.folder, max_batch_size=4)
    expected = [ending.response(prompt) for prompt in PROMPTS]
    lengths = [len(response.split()) for response in expected]
    assert min(lengths) < 5
    assert max(lengths) > 15
    assert len(set(lengths)) > 3
    assert model.responses(PROMPTS, LENGTH) == expected
    # One that ends nothing early gives the same.
    assert model.responses(PROMPTS, LENGTH, is_decided=lambda text: False) == expected
    assert model.responses(PROMPTS, 1) == [ending.response(prompt, 1) for prompt in PROMPTS]
    torch.testing.assert_close(
        model.first_token_logprobs(PROMPTS).double(), torch.stack([ending.logprobs(prompt) for prompt in PROMPTS]), rtol=0, atol=1e-4
    )


@pytest.mark.usefixtures("either_decoder")
@pytest.mark.parametrize("marker", ["dog", "and mat", "no ?"])
def test_rows_that_end_when_decided(ending: Plain, marker: str) -> None:
    """The verdicts are those of the whole responses, and what was generated is a beginning of them."""
    model = load(ending.folder, max_batch_size=4)
    prompts = [*PROMPTS, *(Prompt("", f"{a} {b}") for a in ("the", "my", "no") for b in ("cat", "dog", "mat"))]
    whole = [ending.response(prompt) for prompt in prompts]
    short = model.responses(prompts, LENGTH, is_decided=lambda text: marker in text)
    assert [marker in response for response in short] == [marker in response for response in whole]
    assert all(response.startswith(beginning) for response, beginning in zip(whole, short, strict=True))
    hits = [i for i, response in enumerate(whole) if marker in response]
    assert 0 < len(hits) < len(whole)
    assert all(short[i].endswith(marker) for i in hits)
    assert [short[i] for i in range(len(whole)) if i not in hits] == [response for response in whole if marker not in response]


def test_special_tokens_of_responses(ending: Plain) -> None:
    """The prefix search looks at them, scores do not."""
    model = load(ending.folder)
    expected = [ending.response(prompt, skip_special_tokens=False).removesuffix("<end>").rstrip() for prompt in PROMPTS]
    assert model.responses(PROMPTS, LENGTH, skip_special_tokens=False) == expected
    assert expected != [ending.response(prompt) for prompt in PROMPTS]


def test_tags_of_thoughts_may_be_special_tokens(tmp_path: Path) -> None:
    """Of all special tokens these remain, or a rule would take thoughts for the answer."""
    thinking = tokenizer()
    thinking.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "[OTHER]"]})
    save(tmp_path, build(vocab_size=len(thinking)))
    thinking.save_pretrained(tmp_path)
    model, plain = load(tmp_path), Plain(tmp_path)
    whole = [plain.response(prompt, skip_special_tokens=False) for prompt in PROMPTS]
    assert all(any(token in text for text in whole) for token in ("[/THINK]", "[OTHER]"))
    hidden = ("<pad>", "<unk>", "<end>", "[OTHER]")
    expected = ["".join(word for word in text.split() if word not in hidden) for text in whole]
    assert ["".join(text.split()) for text in model.responses(PROMPTS, LENGTH)] == expected
    closed = model.responses(PROMPTS, LENGTH, is_decided=lambda text: "[/THINK]" in text)
    assert ["".join(text.split()) for text in closed] == ["".join(text.partition("[/THINK]")[:2]) for text in expected]


PARAMETERS = {"attn.o_proj": ComponentParameters(1.0, 1.0, 0.4, 1.0), "mlp.down_proj": ComponentParameters(0.5, 0.0, 1.3, 1.0)}
ABLATIONS = [Ablation(None, PARAMETERS), Ablation(0.3, PARAMETERS), Ablation(1.0, {"mlp.down_proj": PARAMETERS["mlp.down_proj"]})]


def edits_of(ablation: Ablation, directions: Any) -> Iterator[tuple[str, Any, float]]:
    """By hand, for two layers: attention 0.4 and 1.0, MLP 0.5 and 1.3."""
    strengths = {"self_attn.o_proj": (0.4, 1.0), "mlp.down_proj": (0.5, 1.3)}
    for layer in (0, 1):
        if ablation.direction_index is None:
            r = directions[layer + 1]
        else:
            r = directions[1] + ablation.direction_index * (directions[2] - directions[1])
        for path, by_layer in strengths.items():
            if path == "mlp.down_proj" or "attn.o_proj" in ablation.parameters:
                yield f"model.layers.{layer}.{path}", r / np.linalg.norm(r), by_layer[layer]


@pytest.mark.parametrize("mode", ["none", "pre", "full"])
def test_ablated_model(plain: Plain, mode: str) -> None:
    """Scores of single trials, and of several at once, are those of models with edited weights; the original comes back."""
    model, directions = load(plain.folder, max_batch_size=4), unit_directions(3, 32)
    original = model.first_token_logprobs(FEW)
    model.use_directions(directions, mode)
    edited = [plain.edited(list(edits_of(ablation, directions.numpy())), mode) for ablation in ABLATIONS]
    logprobs = [torch.stack([reference.logprobs(prompt) for prompt in FEW]) for reference in edited]
    responses = [[reference.response(prompt, 12) for prompt in FEW] for reference in edited]
    assert len({*map(tuple, responses), tuple(model.responses(FEW, 12))}) == 4

    for ablation, expected_logprobs, expected in zip(ABLATIONS, logprobs, responses, strict=True):
        torch.testing.assert_close(model.first_token_logprobs(FEW, ablation).double(), expected_logprobs, rtol=0, atol=2e-4)
        assert model.responses(FEW, 12, ablation) == expected

    seen = set()
    for rows, values in model.logprobs_of_trials(FEW, ABLATIONS):
        for row, value in zip(rows, values, strict=True):
            torch.testing.assert_close(value.double(), logprobs[row.trial][row.prompt], rtol=0, atol=2e-4)
            seen.add((row.trial, row.prompt))
    everything = {(trial, prompt) for trial in range(3) for prompt in range(len(FEW))}
    assert seen == everything
    rows = list(model.responses_of_trials(model.rows_of(FEW, 3), 12, ABLATIONS))
    assert {(row.trial, row.prompt): model.text_of(row.generated) for row in rows} == {(i, j): responses[i][j] for i, j in everything}
    assert len(rows) == len(everything)

    assert torch.equal(model.first_token_logprobs(FEW), original)


@pytest.mark.usefixtures("either_decoder")
def test_cancelled_trials_are_dropped(plain: Plain) -> None:
    """Rows of a trial that is given up while they are decoded do not come back; those of the others are what they would have been."""
    model = load(plain.folder, max_batch_size=2)
    model.use_directions(unit_directions(3, 32), "none")
    expected = model.responses(PROMPTS, LENGTH, ABLATIONS[0])
    cancelled, texts, dropped = set(), {}, []
    for row in model.responses_of_trials(model.rows_of(PROMPTS, 2), LENGTH, ABLATIONS[:2], cancelled=cancelled):
        if row.trial == 1:
            dropped.append(row)
            cancelled.add(1)
        else:
            texts[row.prompt] = model.text_of(row.generated)
    assert [texts[i] for i in range(len(PROMPTS))] == expected
    assert 0 < len(dropped) < len(PROMPTS)


def test_new_directions_replace_the_old(plain: Plain) -> None:
    model = load(plain.folder)
    model.use_directions(unit_directions(3, 32, seed=5), "full")
    directions = unit_directions(3, 32)
    model.use_directions(directions, "none")
    reference = plain.edited(list(edits_of(ABLATIONS[0], directions.numpy())), "none")
    expected = torch.stack([reference.logprobs(prompt) for prompt in PROMPTS])
    torch.testing.assert_close(model.first_token_logprobs(PROMPTS, ABLATIONS[0]).double(), expected, rtol=0, atol=2e-4)


def test_an_ablation_needs_directions(plain: Plain) -> None:
    with pytest.raises(ValueError, match="call use_directions first"):
        load(plain.folder).first_token_logprobs(PROMPTS, ABLATIONS[0])


NOT_FINITE = "the model returned logits that are not finite (NaN or infinite)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_the_trial(plain: Plain, value: float) -> None:
    model = load(plain.folder)
    with torch.no_grad():
        model.model.lm_head.weight[7] = value
    for call in (lambda: model.first_token_logprobs(PROMPTS), lambda: model.responses(PROMPTS, LENGTH)):
        with pytest.raises(TrialError) as caught:
            call()
        assert str(caught.value) == NOT_FINITE


@pytest.mark.usefixtures("either_decoder")
def test_a_trial_that_overflows_spoils_no_other(tmp_path: Path) -> None:
    model = load(save(tmp_path, loud(build("llama"))))
    model.use_directions(unit_directions(3, 32), "none")
    expected = model.responses(PROMPTS, LENGTH, ABLATIONS[1])
    broken = Ablation(None, {"mlp.down_proj": ComponentParameters(1e38, 1.0, 1e38, 1.0)})
    rows = list(model.responses_of_trials(model.rows_of(PROMPTS, 3), LENGTH, [broken, ABLATIONS[1], broken]))
    assert len(rows) == 3 * len(PROMPTS)
    assert {row.finite for row in rows if row.trial != 1} == {False}
    good = {row.prompt: row for row in rows if row.trial == 1}
    assert all(row.finite for row in good.values())
    assert [model.text_of(good[i].generated) for i in range(len(PROMPTS))] == expected
    with pytest.raises(TrialError):
        model.first_token_logprobs(PROMPTS, broken)


class Memory:
    """An accelerator with room for `n_rows` rows: every pass with more of them fails."""

    def __init__(self, model: Any, n_rows: int) -> None:
        self.n_rows, self.passes, self.failures = n_rows, [], 0
        model.model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module: Any, args: Any, kwargs: Any) -> None:
        n_rows = len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        if n_rows > self.n_rows:
            self.failures += 1
            raise torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB.")
        self.passes.append(n_rows)


@pytest.mark.usefixtures("either_decoder")
@pytest.mark.parametrize("room", [2])
def test_batches_shrink_when_memory_runs_out(ending: Plain, room: int) -> None:
    roomy = load(ending.folder)
    roomy.use_directions(unit_directions(3, 32), "none")
    model = load(ending.folder)
    model.use_directions(unit_directions(3, 32), "none")
    memory = Memory(model, room)
    torch.testing.assert_close(torch.cat(list(model.residuals(PROMPTS))), torch.cat(list(roomy.residuals(PROMPTS))), rtol=0, atol=1e-4)
    assert memory.failures > 0
    torch.testing.assert_close(model.first_token_logprobs(PROMPTS), roomy.first_token_logprobs(PROMPTS), rtol=0, atol=1e-4)
    assert model.responses(PROMPTS, LENGTH) == roomy.responses(PROMPTS, LENGTH)
    assert model.responses(PROMPTS, LENGTH, ABLATIONS[0]) == roomy.responses(PROMPTS, LENGTH, ABLATIONS[0])
    assert max(memory.passes) <= room
    # It is remembered: nothing of the kind fails again.
    failures = memory.failures
    model.first_token_logprobs(PROMPTS)
    model.responses(PROMPTS, LENGTH)
    assert memory.failures == failures


def test_memory_that_runs_out_amid_a_response(ending: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was generated so far is kept, and the rows go on in smaller company to the same end."""
    expected = load(ending.folder).responses(PROMPTS, LENGTH)
    model = load(ending.folder)
    steps = []

    def check(module: Any, args: Any, kwargs: Any) -> None:
        steps.append(len(kwargs["input_ids"]))
        if len(steps) in (6, 11):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.register_forward_pre_hook(check, with_kwargs=True)
    assert model.responses(PROMPTS, LENGTH) == expected
    assert len(steps) > 11
    assert steps[5] > 1


def test_a_single_prompt_that_does_not_fit_is_an_error(plain: Plain) -> None:
    model = load(plain.folder)
    Memory(model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        model.responses(PROMPTS, LENGTH)
    with pytest.raises(torch.OutOfMemoryError):
        model.first_token_logprobs(PROMPTS)


def test_other_errors_are_not_taken_for_lack_of_memory(plain: Plain) -> None:
    model = load(plain.folder)
    calls = []

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(1)
        raise RuntimeError("device-side assert triggered")

    model.model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="device-side assert"):
        model.responses(PROMPTS, LENGTH)
    assert len(calls) == 1


def test_progress_counts_every_prompt(plain: Plain) -> None:
    recorder = Recorder()
    model = load(plain.folder, recorder, max_batch_size=4)
    recorder.tasks.clear()
    list(model.residuals(PROMPTS, "Residuals"))
    model.first_token_logprobs(PROMPTS, description="First tokens")
    model.responses(PROMPTS, 4, description="Responses")
    model.responses(PROMPTS, 4)
    assert [(name, total, sum(units)) for name, total, units in recorder.tasks] == [
        (name, len(PROMPTS), len(PROMPTS)) for name in ("Residuals", "First tokens", "Responses")
    ]


MESSAGES = [{"role": "system", "content": "you are a cat"}, {"role": "user", "content": "hello"}]


def test_chat_template(plain: Plain) -> None:
    recorder = Recorder()
    model = load(plain.folder, recorder)
    assert model.render(MESSAGES) == "<system> you are a cat <end> <user> hello <end> <assistant> "
    model = model.with_response_prefix("yes ")
    assert model.render(MESSAGES[1:]) == "<user> hello <end> <assistant> yes "
    assert (recorder.messages, recorder.warnings) == ([], [])


def test_a_template_in_a_file_that_only_processors_read(tmp_path: Path) -> None:
    recorder = Recorder()
    expected = load(save(tmp_path, build())).render(MESSAGES)
    template = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    assert load(tmp_path, recorder).render(MESSAGES) == expected
    assert recorder.warnings == []
    (tmp_path / "chat_template.json").write_text("[]", encoding="utf-8")
    with pytest.raises(
        ModelError, match=r"^The chat template of .* cannot be read: chat_template\.json is not valid \(list indices must be"
    ):
        load(tmp_path)


def test_a_tokenizer_that_tells_the_types_of_tokens(tmp_path: Path) -> None:
    """As those made for BERT do, whatever the model takes."""
    save(tmp_path, build())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_input_names": names}), encoding="utf-8")
    assert "token_type_ids" in AutoTokenizer.from_pretrained(tmp_path)("hello")
    assert len(load(tmp_path).responses(FEW, 2)) == len(FEW)


def test_a_model_in_float64(tmp_path: Path) -> None:
    model = load(save(tmp_path, build(dtype=torch.float64)), dtypes=["auto"])
    assert model.loaded.dtype == torch.float64
    assert not remainder(model.model, model.architecture).is_inexact(torch.float64)


@pytest.mark.parametrize("template", [NO_SYSTEM_TEMPLATE, DROPS_SYSTEM_TEMPLATE], ids=["refuses", "leaves out"])
def test_template_without_system_messages(template: str, tmp_path: Path) -> None:
    recorder = Recorder()
    model = load(save(tmp_path, build(), template), recorder)
    assert model.render(MESSAGES) == "<user> you are a cat\n\nhello <end> <assistant> "
    more = [*MESSAGES, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "how"}]
    assert model.render(more) == "<user> you are a cat\n\nhello <end> <assistant> yes <end> <user> how <end> <assistant> "
    assert model.render(MESSAGES[1:]) == "<user> hello <end> <assistant> "
    assert recorder.messages == ["The chat template takes no system messages; the system prompt is put before the user's text."]
    assert recorder.warnings == []
    # What the model is given is what the template makes of the folded message.
    reference = Plain(tmp_path)
    expected = torch.stack([reference.logprobs(Prompt("", f"{p.system}\n\n{p.user}" if p.system else p.user)) for p in PROMPTS])
    torch.testing.assert_close(model.first_token_logprobs(PROMPTS).double(), expected, rtol=0, atol=1e-4)


PARTS = (
    "{% for message in messages %}<{{ message['role'] }}> {% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }} {% endif %}{% endfor %}<end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"


def test_templates_that_take_parts(tmp_path: Path) -> None:
    """Those of models that read images: of a text they would render nothing."""
    save(tmp_path, build())
    model = load(save(tmp_path / "parts", build(), PARTS))
    assert model.render(MESSAGES) == "<system> you are a cat <end> <user> hello <end> <assistant> "
    expected = torch.stack([Plain(tmp_path).logprobs(prompt) for prompt in PROMPTS])
    torch.testing.assert_close(model.first_token_logprobs(PROMPTS).double(), expected, rtol=0, atol=1e-4)
    model = load(save(tmp_path / "no system", build(), NO_SYSTEM + PARTS))
    assert model.render(MESSAGES) == "<user> you are a cat\n\nhello <end> <assistant> "


@pytest.mark.parametrize(
    ("template", "failure"),
    [
        ("{% if add_generation_prompt %}<assistant> {% endif %}", "leaves out the user's message"),
        ("{{ raise_exception('no such role') }}", "cannot render the user's message (no such role)"),
        ("{{ '<user>' + messages[0]['content'][:2] }}", "leaves out the user's message"),
    ],
)
def test_templates_that_leave_out_the_prompt(template: str, failure: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(save(tmp_path, build(), template))
    assert str(caught.value) == (
        f"The chat template {failure}, and also if that is given as a list of parts. "
        "Put one that works into the model's folder, as chat_template.jinja."
    )


def test_no_template(tmp_path: Path) -> None:
    recorder = Recorder()
    model = load(save(tmp_path, build(), None), recorder)
    assert model.render(MESSAGES) == "you are a cat\n\nhello\n\n"
    assert recorder.warnings == [
        "This model has no chat template: prompts are passed as plain text after the system prompt. "
        "Base models rarely refuse; an instruction-tuned model should have a template."
    ]


@pytest.mark.parametrize("template", ["<unk> " + TEMPLATE, None], ids=["in the template", "by the tokenizer"])
def test_a_start_token_comes_once(tmp_path: Path, template: str | None) -> None:
    """Where the template writes it, the tokenizer must not add another."""
    starting = tokenizer(template)
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    save(tmp_path, build())
    starting.save_pretrained(tmp_path)
    if template is None:
        (tmp_path / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"] == [1, starting.convert_tokens_to_ids("hello")]
    text = "<user> hello <end> <assistant>" if template else "hello"
    ids = torch.tensor([[1, *(starting.convert_tokens_to_ids(word) for word in text.split())]])
    with torch.inference_mode():
        expected = Plain(tmp_path).model(ids).logits[0, -1].log_softmax(dim=-1)
    torch.testing.assert_close(load(tmp_path).first_token_logprobs([Prompt("", "hello")])[0], expected, rtol=0, atol=1e-4)


def test_prompts_longer_than_the_context(plain: Plain) -> None:
    model = load(plain.folder)
    long = Prompt("", "the cat sat " * 60)
    model.check_lengths([PROMPTS[0], long], "bad_prompts", 73)  # 180 words and 3 of the template: 256
    with pytest.raises(PromptError) as caught:
        model.check_lengths([PROMPTS[0], long], "bad_prompts", 74)
    assert str(caught.value) == (
        "bad_prompts: prompt 2 has 183 tokens, which with 74 new ones exceeds the model's context length of 256. Shorten it, or decrease "
        "max_response_length. It begins: 'the cat sat the cat sat the cat sat the cat sat the cat sat '"
    )


def test_streamed_answer(ending: Plain) -> None:
    model = load(ending.folder)
    model.use_directions(unit_directions(3, 32), "none")
    for prompt in PROMPTS[:4]:
        pieces = []
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        answer = model.stream_response([*messages, {"role": "user", "content": prompt.user}], LENGTH, None, pieces.append)
        assert answer == "".join(pieces)
        assert answer.split() == ending.response(prompt).split()
        assert len(pieces) > 1 or len(answer.split()) < 2
    edited = ending.edited(list(edits_of(ABLATIONS[0], unit_directions(3, 32).numpy())), "none")
    answer = model.stream_response([{"role": "user", "content": TEXTS[3]}], LENGTH, ABLATIONS[0], lambda piece: None)
    assert answer.split() == edited.response(Prompt("", TEXTS[3])).split()


# Loading


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", "mixtral", "qwen3_moe"])
def test_transposed_weights_and_experts_that_are_offloaded(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their layout is found by gradients, of weights that Accelerate loads anew for every call."""
    save(tmp_path, build(model_type))
    here = load(tmp_path)
    _offload(monkeypatch)
    away = load(tmp_path)
    assert all(parameter.is_meta for parameter in away.model.parameters())
    assert away.architecture.components == here.architecture.components
    for mode in ("none", "full"):
        for model in (here, away):
            model.use_directions(unit_directions(3, 32), mode)
        torch.testing.assert_close(away.first_token_logprobs(FEW, ABLATIONS[0]), here.first_token_logprobs(FEW, ABLATIONS[0]))
    assert (here.first_token_logprobs(FEW) - here.first_token_logprobs(FEW, ABLATIONS[0])).abs().max() > 0.1


def test_offloaded_experts_that_only_an_edit_of_their_weights_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, build("mixtral"))
    _offload(monkeypatch)
    model = load(tmp_path)
    monkeypatch.setattr(heretic.editing.hooks, "_is_swapped", lambda writer, mode: writer.storage.n_experts is not None)
    with pytest.raises(UnsupportedModelError) as caught:
        model.use_directions(unit_directions(3, 32), "full")
    assert str(caught.value) == (
        "model.layers.0.mlp.experts is offloaded, and an edit of it replaces weights, which are loaded anew for every pass. "
        "Let it fit into memory (--max-memory, --quantization bnb_4bit)."
    )


def _offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have weights lie in main memory but for the moment that they are needed, as those have that do not fit on an accelerator."""
    load_weights = heretic.loading.load._load_weights

    def offloaded(*arguments: Any) -> nn.Module:
        model: nn.Module = cpu_offload(load_weights(*arguments), execution_device=torch.device("cpu"))
        return model

    monkeypatch.setattr(heretic.loading.load, "_load_weights", offloaded)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_layers_that_are_offloaded(tmp_path: Path, model_type: str) -> None:
    """Weights that are on the disk but for the moment they are needed, those of norms behind writers too."""
    save(tmp_path, build(model_type))
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    here, away = load(tmp_path), load(tmp_path, device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"})
    assert away.architecture.writers[-1].module.weight.is_meta
    for mode in ("none", "full"):
        for model in (here, away):
            model.use_directions(unit_directions(3, 32), mode)
        torch.testing.assert_close(away.first_token_logprobs(FEW, ABLATIONS[0]), here.first_token_logprobs(FEW, ABLATIONS[0]))
        assert away.responses(FEW, 6, ABLATIONS[1]) == here.responses(FEW, 6, ABLATIONS[1])
    assert (here.first_token_logprobs(FEW) - here.first_token_logprobs(FEW, ABLATIONS[0])).abs().max() > 0.1


def test_number_formats_are_tried_in_order(tmp_path: Path) -> None:
    """Weights beyond float16's range: its test run gives numbers that are not finite, the next format is taken."""
    model = build()
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    recorder = Recorder()
    loaded = load(save(tmp_path, model), recorder, dtypes=["float16", "float32", "bfloat16"])
    assert loaded.loaded.dtype == loaded.model.dtype == torch.float32
    assert recorder.warnings == ["Loading in float16 failed: the test run returned logits that are not finite"]


@pytest.mark.parametrize(("bfloat16", "is_slower"), [(1.0, False), (2.2, False), (3.0, True)])
def test_a_slow_moment_does_not_choose_the_number_format(bfloat16: float, is_slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that bfloat16 takes, but for the first time, when another program has taken the caches away; float32 takes two.
    Where they are about as fast, chance would choose."""
    clock, spent = 0.0, iter([9.0, 2.0, *[bfloat16, 2.0] * 50])

    def thread_time() -> float:
        nonlocal clock, is_start
        is_start = not is_start
        clock += 0.0 if is_start else next(spent)
        return clock

    is_start = False
    monkeypatch.setattr(heretic.loading.load.time, "thread_time", thread_time)
    assert heretic.loading.load._bfloat16_is_slower(64) == is_slower


@pytest.mark.parametrize(("is_slower", "computed"), [(True, torch.float32), (False, torch.bfloat16)])
def test_number_formats_are_compared_at_the_width_of_the_model(
    is_slower: bool, computed: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    monkeypatch.setattr(heretic.loading.load, "_bfloat16_is_slower", lambda width: widths.append(width) or is_slower)
    model = build().to(torch.bfloat16)
    recorder = Recorder()
    loaded = load(save(tmp_path, model), recorder, dtypes=["auto"], device_map="cpu").loaded
    assert (widths, loaded.dtype, loaded.stored_dtype) == ([model.config.hidden_size], computed, torch.bfloat16)
    said = "Computing in float32, which is faster on this CPU (the model is stored in bfloat16)."
    assert (said in recorder.messages) == is_slower


def test_a_single_logit_that_is_rounded_far_off_costs_no_speed(tmp_path: Path) -> None:
    """Large vocabularies have such tokens. A difference of all of them is another result, and transformers generates."""
    save(tmp_path, build())
    for places, decoder in ((slice(7, 8), Decoder), (slice(0, 60, 2), PlainDecoder)):
        loaded = load(tmp_path).loaded

        def off(module: nn.Module, args: object, logits: Tensor, places: slice = places) -> Tensor:
            if len(logits) > 1:  # in batches
                logits[..., places] += 0.004 * logits.std()
            return logits

        loaded.model.get_output_embeddings().register_forward_hook(off)
        assert type(Model(loaded, settings(tmp_path)).decoder) is decoder


def test_no_number_format_works(tmp_path: Path) -> None:
    model = build()
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError) as caught:
        load(save(tmp_path, model), dtypes=["auto", "float16", "float32"])
    assert str(caught.value) == (
        f"The model {tmp_path} could not be loaded in any dtype. float32: the test run returned logits that are not finite; "
        "float16: the test run returned logits that are not finite."
    )


def test_generation_is_greedy_whatever_the_model_says(tmp_path: Path) -> None:
    model = build("llama", seed=3)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, eos_token_id=2, pad_token_id=0
    )
    loaded = load(save(tmp_path, model))
    plain = Plain(tmp_path)
    assert loaded.responses(PROMPTS, LENGTH) == [plain.response(prompt) for prompt in PROMPTS]
    assert loaded.loaded.generation_config.temperature == 5.0


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    save(tmp_path, build())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.tokenizer.pad_token, model.tokenizer.padding_side) == ("<end>", "left")
    plain = Plain(tmp_path)
    assert model.responses(PROMPTS, LENGTH) == [plain.response(prompt) for prompt in PROMPTS]


def test_weights_that_are_not_in_the_files_are_told(plain: Plain, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(plain.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recorder = Recorder()
    load(folder, recorder)
    assert recorder.warnings == [
        "Missing in the model's files and randomly initialized: model.layers.0.mlp.up_proj.weight. "
        "Check that the files are complete and the model type is right."
    ]
