"""Whole runs on emulated accelerators: they give the scores, the files and the texts that the CPU gives."""

import itertools
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import save_and_load
from safetensors.torch import load_file

import test_benchmark as benchmarks
import test_compare as comparisons
import tiny
from conftest import Outcome
from emulated import DeviceTensor, Emulation
from emulated.memory import Allocation, Memory
from heretic.decoding.decoder import Decoder
from heretic.decoding.packed import packed_logits
from heretic.decoding.pool import Pool
from heretic.device import describe_device, free_memory
from heretic.editing import hooks
from heretic.editing.ablation import Ablation, ComponentParameters, OutputMap
from heretic.loading.load import load_model
from heretic.loading.source import model_source
from heretic.prompts import Prompt
from heretic.scoring.openings import FEWEST_REFUSALS, Openings
from heretic.session import stages
from heretic.study import learning
from heretic.utils import SilentProgress
from test_learned_runs import ONE, learn_briefly, write_study
from test_shared_search import as_optuna_reads

tasks, saved = benchmarks.tasks, comparisons.saved  # fixtures
Heretic = Callable[..., Outcome]
GIB = 2**30
# Refusals of a trial that is stopped because it is dominated are an estimate: on an accelerator texts are judged one step later.
TO_THE_END = "--no-stop-dominated-trials"
SAVE = ["--model-action", "save", "--trial-index", "0", "--export-strategy", "merge"]
# Layers of the tiny model on two devices.
SPLIT = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}


def scores_in(folder: str) -> list[list[float]]:
    """Refusals, first-token and sequence divergence of every trial of a study, in order."""
    (journal,) = Path(folder).glob("*.jsonl")
    names = ("refusals", "kl_divergence", "sequence_kl_divergence")
    attributes = [trial.user_attrs for trial in as_optuna_reads(journal)]
    return [[float(own["scores"].get(name, own.get(name))) for name in names] for own in attributes]


def run(heretic: Heretic, name: str, *options: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """A run with a study and a saved model of its own: its scores, and the weights of the first trial of its front."""
    outcome = heretic(*options, TO_THE_END, *SAVE, "--save-directory", name, "--study-checkpoint-dir", f"{name}-study")
    assert (outcome.code, outcome.err) == (0, ""), outcome.out + outcome.err
    (report,) = Path(f"{name}-study").glob("*.report.html")
    assert "</html>" in report.read_text()
    return scores_in(f"{name}-study"), load_file(f"{name}/model.safetensors")


def check_like_the_cpu(heretic: Heretic, emulation: Emulation, *options: str, there: tuple[str, ...] = ()) -> None:
    """A run on the emulation has the CPU's scores and saves the CPU's weights."""
    scores, weights = run(heretic, "cpu", *options)
    with emulation:
        other_scores, other_weights = run(heretic, "other", *options, *there)
    assert len(scores) >= 3
    for own, other in zip(scores, other_scores, strict=True):
        assert other == pytest.approx(own, rel=1e-4, abs=1e-6)
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight)


# Each mode and each type once among the fast tests.
FAST = [("none", "gpt2"), ("pre", "llama"), ("full", "mixtral")]
LONG = [pair for pair in itertools.product(["none", "pre", "full"], ["llama", "gpt2", "mixtral"]) if pair not in FAST]


@pytest.mark.parametrize(("mode", "model_type"), [*FAST, *(pytest.param(*pair, marks=pytest.mark.long) for pair in LONG)])
def test_all_modes(workplace: Path, heretic: Heretic, mode: str, model_type: str) -> None:
    if model_type != "llama":
        shutil.rmtree("m")
        tiny.save(Path("m"), tiny.build(model_type))
    emulation = Emulation((GIB,))
    check_like_the_cpu(heretic, emulation, "--row-normalization", mode, "--trials-per-batch", "2")
    assert emulation.memory.peak[0] > 50_000 and emulation.counts.launches.total() > 1000, "it ran there"


def test_no_float64_on_the_device(workplace: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every accelerator has it."""
    dtypes: set[torch.dtype] = set()
    of = Memory.of

    def noted(memory: Memory, inner: torch.Tensor, device: int) -> Allocation:
        dtypes.add(inner.dtype)
        return of(memory, inner, device)

    monkeypatch.setattr(Memory, "of", noted)
    with Emulation():
        assert heretic("--n-trials", "1", "--n-startup-trials", "1", "--n-finalists", "0").code == 0
    assert torch.float32 in dtypes and torch.float64 not in dtypes


@pytest.mark.slow
def test_the_demonstration(tmp_path: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    search = ["--n-trials", "4", "--n-startup-trials", "3", "--n-finalists", "1", "--seed", "1", "--max-response-length", "20"]
    search += [f"--{kind}prompts.split=[:40]" for kind in ("good-", "bad-", "good-evaluation-", "bad-evaluation-")]
    check_like_the_cpu(heretic, Emulation((GIB,)), "--demo", *search, "--dtypes", "float32", "--row-normalization", "full")


@pytest.fixture
def map_dtypes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[torch.dtype, torch.dtype, str]]:
    """The dtypes of outputs that were mapped, those of the maps, and the kind of device."""
    seen: set[tuple[torch.dtype, torch.dtype, str]] = set()
    apply = hooks.apply_output_map

    def noted(y: torch.Tensor, edit: OutputMap, membership: torch.Tensor | None = None) -> torch.Tensor:
        seen.add((y.dtype, edit.left.dtype, y.device.type))
        return apply(y, edit, membership)

    monkeypatch.setattr(hooks, "apply_output_map", noted)
    return seen


IN_BFLOAT16 = {(torch.bfloat16, torch.float32, kind) for kind in ("cpu", "cuda")}


def test_trials_in_bfloat16(workplace: Path, heretic: Heretic, map_dtypes: set[Any]) -> None:
    options = ("--dtypes", "bfloat16", "--row-normalization", "full", "--trials-per-batch", "2", "--n-finalists", "0", TO_THE_END)
    assert heretic(*options, "--study-checkpoint-dir", "cpu").code == 0
    with Emulation():
        assert heretic(*options, "--study-checkpoint-dir", "other").code == 0
    for own, other in zip(scores_in("cpu"), scores_in("other"), strict=True):
        assert other == pytest.approx(own, rel=0.1, abs=2e-3)
    assert map_dtypes == IN_BFLOAT16


def test_where_things_are(workplace: Path) -> None:
    with Emulation((GIB, GIB // 2)) as emulation:
        settings = tiny.settings("m")
        model = load_model(settings, model_source(settings), SilentProgress()).model
        assert all(isinstance(parameter, DeviceTensor) for parameter in model.parameters())
        used = emulation.memory.allocated[0]
        assert free_memory(torch.device("cuda", 0)) == GIB - used and used > 50_000
        assert describe_device() == "Emulated (cuda:0), 1.0 of 1.0 GiB memory free; Emulated (cuda:1), 0.5 of 0.5 GiB memory free"


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.long), "full"])
def test_layers_on_two_devices(workplace: Path, heretic: Heretic, mode: str) -> None:
    emulation = Emulation((GIB, GIB))
    options = ("--row-normalization", mode, "--trials-per-batch", "3")
    check_like_the_cpu(heretic, emulation, *options, there=("--device-map", json.dumps(SPLIT)))
    assert min(emulation.memory.peak) > 10_000


@pytest.mark.parametrize("memory", ["40KB", pytest.param("5KB", marks=pytest.mark.long)], ids=["some layers", "the embedding as well"])
def test_layers_in_main_memory(workplace: Path, heretic: Heretic, memory: str) -> None:
    limits = json.dumps({"0": memory, "cpu": "1GB"})
    check_like_the_cpu(heretic, Emulation((GIB,)), "--row-normalization", "full", there=("--max-memory", limits))


def test_residual_geometry(workplace: Path, heretic: Heretic) -> None:
    def geometry() -> str:
        outcome = heretic("--print-residual-geometry", "--checkpoint-action", "restart")
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out[outcome.out.index("Residual geometry") :].split("└")[0]

    here = geometry()
    with Emulation():
        assert geometry() == here


@pytest.mark.long
def test_compare(saved: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT has safetensors put an adapter on the device, which no emulation sees.
    load = save_and_load.safe_load_file
    monkeypatch.setattr(save_and_load, "safe_load_file", lambda file, device: {k: v.to(device) for k, v in load(file).items()})
    with Emulation():
        comparisons.test_a_model_what_was_saved_of_it_and_the_study_itself(saved, heretic)


@pytest.mark.long
def test_benchmark(tasks: Path, heretic: Heretic) -> None:
    with Emulation():
        benchmarks.TestWithTheHarness().test_original_and_edited_model_get_their_own_scores(tasks, heretic)


def test_chat(workplace: Path) -> None:
    kernel = ComponentParameters(1.0, 1.0, 0.5, 1.0)
    ablation = Ablation(None, {"attn.o_proj": kernel, "mlp.down_proj": kernel})

    def answers() -> list[list[str]]:
        model = tiny.load("m")
        model.use_directions(tiny.unit_directions(3, 32).float(), "full")
        pieces: list[list[str]] = [[], []]
        for own, edit in zip(pieces, (None, ablation), strict=True):
            model.stream_response([{"role": "user", "content": "how do i bake bread"}], 12, edit, own.append)
        return pieces

    here = answers()
    assert here[0] != here[1]
    with Emulation():
        assert answers() == here


def events_of(model: Any, monkeypatch: pytest.MonkeyPatch, waits: Callable[[], int]) -> str:
    """What decoding does in which order: `s`, a step is launched; `t`, a text is judged; `n`, new tokens are waited for and noted."""
    events: list[tuple[str, int]] = []
    step, note = Decoder.step, Pool._note

    def launched(self: Decoder, *arguments: Any) -> torch.Tensor:
        logits = step(self, *arguments)
        events.append(("s", waits()))
        return logits

    def noted(self: Pool, *arguments: Any) -> None:
        events.append(("n", waits()))
        note(self, *arguments)

    def judged(text: str) -> bool:
        events.append(("t", waits()))
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", launched)
        patch.setattr(Pool, "_note", noted)
        prompts = [Prompt("", text) for text in ("how do i bake bread", "fix my bike", "hello cat")]
        assert len(list(model.responses_of_trials(model.rows_of(prompts, 1), 6, [], is_decided=judged))) == len(prompts)
    for (kind, before), (following, after) in itertools.pairwise(events):
        assert after == before or kind == "n" or (kind, following) == ("t", "s"), "the host waits for nothing else"
    return "".join(kind for kind, _ in events)


def test_texts_are_judged_while_the_device_computes_the_next_step(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch("(nt+s)+n", events_of(tiny.load("m"), monkeypatch, lambda: 0)), "on a CPU at once"
    with Emulation() as emulation:
        events = events_of(tiny.load("m"), monkeypatch, emulation.counts.waits.total)
    assert re.fullmatch("n(st+n){5}", events)


def test_packed_rows_and_openings_wait_for_nothing() -> None:
    openings = Openings()
    for tokens in ([7, 8], [7, 9], [10]) * FEWEST_REFUSALS:
        openings.add(tokens, refuses=True)
    rows = [[5, 6, 7, 8, 11], [5, 6, 7, 12]]
    with Emulation() as emulation, torch.inference_mode():
        model = tiny.build().to("cuda:0")
        emulation.counts.clear()
        for logits in packed_logits(model, rows, [3, 2]):
            logprobs = torch.log_softmax(logits, dim=-1)
            openings.without_refusals([7, 8], logprobs[:2])
            openings.log_probability([7, 8], logprobs[:2], True)
        assert emulation.counts.waits == {} and emulation.counts.launches.total() > 100


@pytest.mark.slow
def test_learned_edits(tmp_path: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch, map_dtypes: set[Any]) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path)
    learn_briefly(monkeypatch.setattr)
    monkeypatch.setattr(learning, "ROUND_STEPS", 3)  # every operation is looked at, which takes its time
    assert heretic(*ONE, "--dtypes", "bfloat16", "--study-checkpoint-dir", "cpu").code == 0
    with Emulation():
        outcome = heretic(*ONE, "--dtypes", "bfloat16", "--study-checkpoint-dir", "other")
    assert (outcome.code, outcome.err) == (0, "")
    assert map_dtypes == {(torch.bfloat16, torch.float32, kind) for kind in ("cpu", "cuda")}
    # Each step rounds otherwise, and steps follow each other.
    assert scores_in("other")[0] == pytest.approx(scores_in("cpu")[0], rel=0.05, abs=1e-3)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Holds whether a model is loaded by now: what a model and the look at its structure take must be there."""
    load, loaded = stages.load_model_to_edit, [False]

    def load_and_note(*arguments: Any) -> Any:
        model = load(*arguments)
        loaded[0] = True
        return model

    monkeypatch.setattr(stages, "load_model_to_edit", load_and_note)
    return loaded


def many_prompts() -> None:
    """Enough of them for passes to share what prompts begin with."""
    for name in ("good.txt", "bad.txt"):
        Path(name).write_text("\n".join([Path(name).read_text()] * 3))


@pytest.mark.parametrize(
    "seed", [pytest.param(0, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_memory_that_runs_out_at_random(workplace: Path, heretic: Heretic, seed: int, loaded: list[bool]) -> None:
    """Passes are made again with fewer rows, and give the same."""
    many_prompts()
    scores, _ = run(heretic, "cpu", "--trials-per-batch", "3")
    loaded[0] = False
    rng = random.Random(seed)
    with Emulation((GIB,), fails=lambda n_bytes: loaded[0] and n_bytes > 1000 and rng.random() < 0.0003) as emulation:
        other, _ = run(heretic, "other", "--trials-per-batch", "3")
    assert emulation.memory.n_failed
    for own, found in zip(scores, other, strict=True):
        assert found == pytest.approx(own, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_memory_that_hardly_suffices(workplace: Path, heretic: Heretic) -> None:
    """The model takes 62 kB of it, and with all rows at once the run would take 1.5 MB."""
    many_prompts()
    emulation = Emulation((200_000,))
    check_like_the_cpu(heretic, emulation, "--trials-per-batch", "3")
    assert emulation.memory.n_failed


def test_memory_that_does_not_suffice_for_a_single_prompt(workplace: Path, heretic: Heretic, loaded: list[bool]) -> None:
    with Emulation((GIB,), fails=lambda n_bytes: loaded[0]):
        outcome = heretic()
    told = "Error: Out of memory (OutOfMemoryError: CUDA out of memory. Tried to allocate 0.00 MiB."
    hint = "). Try --quantization bnb_4bit or --max-memory. Finished trials are kept.\n"
    assert outcome.code == 1 and outcome.err.startswith(told) and outcome.err.endswith(hint)


@pytest.mark.slow
def test_workers_on_two_devices(workplace: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own, which enter the emulation when they start."""
    (workplace / "start").mkdir()
    tests = repr(str(Path(__file__).parent))
    code = f"import sys; sys.path.insert(0, {tests}); import emulated; emulated.Emulation((2**32,) * 2).__enter__()"
    (workplace / "start" / "sitecustomize.py").write_text(code)
    scores, _ = run(heretic, "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(workplace / "start"), *sys.path]))
    with Emulation((2**32,) * 2):
        outcome = heretic("--workers", "2", "--study-checkpoint-dir", "both", "--model-action", "none")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "device 0; device 1" in outcome.out
    first = scores_in("both")
    assert len(first) >= 3 and all(any(found == pytest.approx(own, rel=1e-4, abs=1e-6) for own in scores[:2]) for found in first[:2])
