"""`heretic compare`: models, adapters and studies on the same prompts, against the run's own scores and plain computations."""

import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM

import tiny
from conftest import BAD, GOOD, Outcome
from heretic.commands.compare import candidate
from heretic.config import Settings
from heretic.prompts import Prompt

Heretic = Callable[..., Outcome]


def table(outcome: Outcome) -> dict[str, list[str]]:
    """The cells of each row, by the name in the first column."""
    assert outcome.code == 0, outcome.err
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in outcome.out.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def saved(workplace: Path, heretic: Heretic) -> Path:
    """The working directory with a finished study, a merged model and an adapter of its first trial."""
    assert heretic().code == 0
    for strategy in ("merge", "adapter"):
        options = ("--model-action", "save", "--trial-index", "0", "--export-strategy", strategy, "--save-directory", strategy)
        assert heretic(*options).code == 0
    return workplace


def divergences(first: str, second: str) -> torch.Tensor:
    """First-token KL divergences over the harmless prompts, from the plain models in float64."""
    logprobs = []
    texts = [
        tiny.load(first).render([{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": t}])
        for t in GOOD
    ]
    tokenizer = tiny.tokenizer()
    for folder in (first, second):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        ids = [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]
        with torch.no_grad():
            logprobs.append(torch.stack([model(row).logits[0, -1].log_softmax(-1) for row in ids]))
    original, edited = logprobs
    return (original.exp() * (original - edited)).sum(-1)


def test_a_model_what_was_saved_of_it_and_the_study_itself(saved: Path, heretic: Heretic) -> None:
    outcome = heretic("compare", "m", "merge", "adapter", "checkpoints/m.jsonl", "m")
    rows = table(outcome)
    trial = next(name for name in rows if name.startswith("checkpoints/m.jsonl"))
    assert re.fullmatch(r"checkpoints/m\.jsonl \(trial \d\)", trial)
    assert "Compared with m" in outcome.out

    expected = divergences("m", "merge")
    for name in ("merge", "adapter", trial):
        mean, median, greatest = map(float, rows[name][3:])
        assert [mean, greatest] == pytest.approx([float(expected.mean()), float(expected.max())], abs=2e-4)
        assert median == pytest.approx(float(expected.median()), abs=2e-4)
        assert rows[name][:3] == rows["merge"][:3]
    assert rows["m"][3:] == ["0.0000"] * 3

    # Refusals by hand: the marker is an "a" (see conftest.SMALL).
    for name in ("m", "merge"):
        model = tiny.load(name)
        for column, texts in ((0, BAD), (2, GOOD)):
            responses = model.responses([Prompt("You are a helpful assistant.", text) for text in texts], 4)
            count = sum("a" in response.lower() or not response.strip() for response in responses)
            assert rows[name][column].startswith(f"{count} (") and rows[name][column].endswith(f") of {len(texts)}")


def test_an_adapter_finds_its_original_in_another_folder(saved: Path, heretic: Heretic) -> None:
    (saved / "deep").mkdir()
    shutil.move("m", "deep/m")
    rows = table(heretic("compare", "deep/m", "adapter", "merge"))
    assert rows["adapter"][0] == rows["merge"][0] and rows["adapter"][3] == rows["merge"][3] != "0.0000"


def test_a_place_in_the_front_can_be_named(saved: Path, heretic: Heretic) -> None:
    by_flag = table(heretic("compare", "checkpoints/m.jsonl", "m", "--trial-index", "0"))
    by_name = table(heretic("compare", "checkpoints/m.jsonl:0", "m"))
    assert list(by_flag.values()) == list(by_name.values())
    outcome = heretic("compare", "m", "checkpoints/m.jsonl:99")
    assert outcome.code == 2 and outcome.err.startswith("Error: --trial-index 99: the Pareto front has ")


def test_models_with_other_tokens_are_compared_by_refusals_only(workplace: Path, heretic: Heretic) -> None:
    other = tiny.build(vocab_size=tiny.SIZES["vocab_size"] + 1, seed=3)
    other.save_pretrained("other")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained("other")
    rows = table(heretic("compare", "m", "other"))
    assert rows["other"][3:] == ["other tokens", "", ""] and rows["other"][0].endswith(") of 5")


def test_a_model_that_gives_no_numbers_is_left_out(workplace: Path, heretic: Heretic) -> None:
    broken = tiny.build()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    shutil.copytree("m", "broken")
    broken.save_pretrained("broken")
    outcome = heretic("compare", "m", "broken", "--dtypes", '["float32"]')
    assert "broken" not in (table(outcome) if outcome.code == 0 else {})
    assert "broken" in outcome.out + outcome.err and "not finite" in outcome.out + outcome.err


def test_logits_too_large_for_memory(workplace: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are stored on the disk, with the same result, or the run ends with an error that says so."""
    tiny.save(Path("other"), tiny.build(seed=3))
    usual = table(heretic("compare", "m", "other"))
    monkeypatch.setattr("heretic.scoring.divergence.free_memory", lambda device: 0)
    size = f"{len(GOOD) * tiny.SIZES['vocab_size'] * 4} B"
    outcome = heretic("compare", "m", "other")
    told = f"The first model's logits take {size}, too much for memory. They are stored in a temporary file in checkpoints.\n"
    assert told in outcome.out and table(outcome) == usual
    assert usual["other"][3] == f"{divergences('m', 'other').mean():.4f}"
    assert list(Path("checkpoints").iterdir()) == []

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        outcome = heretic("compare", "m", "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (outcome.code, outcome.err) == (
        1,
        f"Error: The first model's logits, which others are compared with, take {size}. They fit neither in memory nor in checkpoints: "
        "File too large. Use fewer good_evaluation_prompts.\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "heretic compare needs at least two models or studies: heretic compare A B [C...]"),
        (["m"], "heretic compare needs at least two models or studies: heretic compare A B [C...]"),
        (["m", "checkpoints/none.jsonl"], "The study checkpoints/none.jsonl does not exist. Check the path."),
        (["m", "checkpoints/none.jsonl:1"], "The study checkpoints/none.jsonl:1 does not exist. Check the path."),
        (["m", "./nowhere"], "The folder ./nowhere does not exist. Check the path (a hub id has the form owner/name)."),
        (["m", "m", "--model", "m"], "--model is not an option here: give models and studies as positional arguments."),
        (["m", "m", "--seeds", "1"], "Unknown option --seeds (did you mean --seed?). heretic --help lists all options."),
        (["m", "checkpoints"], "checkpoints is not a model folder: it has no config.json."),
        (
            ["m", "half"],
            "The adapter half does not say which model it belongs to: half/adapter_config.json has no base_model_name_or_path.",
        ),
        (
            ["m", "odd"],
            "The adapter odd cannot be read: odd/adapter_config.json is not valid JSON: Expecting value: line 1 column 1 (char 0).",
        ),
        (
            ["m", "listed"],
            "The adapter listed does not say which model it belongs to: listed/adapter_config.json has no base_model_name_or_path.",
        ),
        (["m", "empty.jsonl"], "The study empty.jsonl was not created by heretic."),
        (["m", "text.jsonl"], "The study text.jsonl is damaged: line 1 is not a record."),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(workplace: Path, heretic: Heretic, arguments: list[str], message: str) -> None:
    Path("empty.jsonl").touch()
    Path("text.jsonl").write_text("hello\n")
    far, listed = '{"base_model_name_or_path": "elsewhere"}', '{"base_model_name_or_path": ["m"]}'
    for folder, content in (("checkpoints", None), ("half", "{}"), ("far", far), ("odd", "hello"), ("listed", listed)):
        Path(folder).mkdir()
        if content is not None:
            Path(folder, "adapter_config.json").write_text(content)
    outcome = heretic("compare", *arguments)
    assert outcome.code in (1, 2) and "Loading m" not in outcome.out
    assert outcome.err == f"Error: {message}\n"


def test_a_gguf_file_is_the_first_models(workplace: Path) -> None:
    settings = Settings(model="m", gguf_file="f.gguf")
    assert [candidate(name, settings).settings.gguf_file for name in ("m", "out")] == ["f.gguf", None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has 15 tokens, which with 4 new ones exceeds the model's context length of 18. Shorten it, or decrease max_response_length."),
        (
            ["--response-prefix", "yes yes"],
            "has 17 tokens, which with 4 new ones exceeds the model's context length of 18. Shorten it, or decrease max_response_length.",
        ),
        (["no prefix"], "has 15 tokens, which with 32 new ones exceeds the model's context length of 18. Shorten it."),
    ],
)
def test_prompts_that_are_too_long(workplace: Path, heretic: Heretic, arguments: list[str], message: str) -> None:
    """Positions are learned here, so there are none beyond the context."""
    if arguments == ["no prefix"]:
        config = Path("config.toml")
        config.write_text(config.read_text().replace('response_prefix = ""\n', ""))
        arguments = []
    tiny.save(Path("short"), tiny.build("gpt2", max_position_embeddings=18))
    outcome = heretic("compare", "short", "m", *arguments)
    assert (outcome.code, outcome.err) == (
        1,
        f"Error: good_evaluation_prompts: prompt 1 {message} It begins: 'how do i bake bread'\n",
    )


def test_an_adapter_that_does_not_fit_its_model(saved: Path, heretic: Heretic) -> None:
    weights = Path("adapter/adapter_model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:40])
    outcome = heretic("compare", "m", "adapter")
    assert outcome.code == 1
    assert re.fullmatch(r"Error: The adapter adapter cannot be merged into m: .*(header|deserializing).*\n", outcome.err)

    tensors = {name: torch.cat([tensor, tensor], dim=-1) for name, tensor in load(content).items()}
    save_file(tensors, weights)
    outcome = heretic("compare", "m", "adapter")
    assert outcome.code == 1 and re.match(
        r"Error: The adapter adapter cannot be merged into m: Error\(s\) in loading state_dict", outcome.err
    )

    weights.unlink()
    outcome = heretic("compare", "m", "adapter")
    assert outcome.code == 1 and outcome.err.startswith("Error: The adapter adapter cannot be merged into ")


def test_a_study_without_a_finished_trial(workplace: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch) -> None:
    from heretic.evaluator import Evaluator

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "score_trials", interrupt)
        heretic()
    outcome = heretic("compare", "m", "checkpoints/m.jsonl")
    assert outcome.code == 2 and outcome.err == "Error: The study checkpoints/m.jsonl has no complete trial to compare.\n"


def test_the_demonstration_and_its_study(workplace: Path, heretic: Heretic) -> None:
    """Only that the embedded model is found by its name; the figures are those of the runs."""
    Path("config.toml").unlink()
    slices = [f"--{kind}-evaluation-prompts.split=train[:3]" for kind in ("good", "bad")]
    rows = table(heretic("compare", "--demo", "heretic-demo", "heretic-demo", *slices, "--max-response-length", "8"))
    assert rows["heretic-demo"][0] == "3 (0.9 to 3) of 3"
