"""The model card by its text and metadata, the picture of the kernel by its points, and that nothing shared tells of this machine."""

import dataclasses
import getpass
import itertools
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from heretic import __version__
from heretic.config import Settings
from heretic.editing.ablation import Ablation, ComponentParameters, kernel
from heretic.errors import ExportError
from heretic.loading.source import ModelSource, model_source
from heretic.privacy import public_name, public_settings, without_token
from heretic.reporting.kernel_picture import kernel_picture
from heretic.reporting.learned import Points
from heretic.saving.card import copy_licence, model_card, original_card, write_card
from heretic.saving.export import save
from heretic.saving.record import Result, Strategy, record
from heretic.specifications import PromptSpecification
from heretic.utils import SilentProgress
from hub_server import Hub, Repository, serve
from tiny import Recorder, build, load, settings, unit_directions
from tiny import save as save_original

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ABLATION = Ablation(0.3, {"attn.o_proj": ComponentParameters(1.0, 1.0, 0.4, 1.0), "mlp.down_proj": ComponentParameters(1.3, 1.0, 0.5, 0.5)})
ORIGINAL_CARD = """\
---
language:
- en
- de
license: other
license_name: tiny-research
license_link: LICENSE
pipeline_tag: text-generation
library_name: transformers
base_model: somebody/tiny-base
tags:
- chat
datasets:
- somebody/words
---

# Tiny

A *tiny* model. | Ask it about bread.
"""


def result_for(chosen: Settings, **changes: Any) -> Result:
    values = {"refusals": 3, "kl_divergence": 0.0123, "base_refusals": 95, "n_bad_prompts": 100, "response_prefix": "yes "}
    return Result(chosen, 17, ABLATION, **{**values, **changes})


def original_with(folder: Path, card: str | None) -> Path:
    save_original(folder, build("llama"))
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def export(original: Path, target: Path, strategy: Strategy = "merge", progress: Any = None, **changes: Any) -> Path:
    model, chosen = load(original), settings(original, seed=7, **changes)
    model.use_directions(unit_directions(3, 32), "none")
    return save(model, result_for(chosen), strategy, str(target), False, progress or SilentProgress())


def table_rows(text: str, first: str) -> dict[str, list[str]]:
    """Rows of the table whose first heading is `first`, by their first cell."""
    lines = text[text.index(f"| {first} |") :].split("\n\n", maxsplit=1)[0].splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.mark.parametrize(
    ("strategy", "library", "what"), [("merge", "transformers", "a modified copy of"), ("adapter", "peft", "an adapter for")]
)
def test_card(tmp_path: Path, strategy: Strategy, library: str, what: str) -> None:
    original = original_with(tmp_path / "tiny-model", ORIGINAL_CARD)
    export(original, tmp_path / "out", strategy, row_normalization="pre")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "language": ["en", "de"],
        "license": "other",
        "license_name": "tiny-research",
        "license_link": "LICENSE",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["heretic", "abliterated", "decensored"],
    }
    assert text.count("\n# tiny-model, refusals removed\n") == 1
    assert f"This is {what} `tiny-model`." in text
    assert f"directional ablation with heretic {__version__}, no weight was trained" in text
    assert "2 `attn.o_proj` modules and 2 `mlp.down_proj` modules" in text
    assert "**Safeguards were removed.**" in text
    assert table_rows(text, "") == {
        "refusals on 100 harmful prompts": ["95", "3"],
        "first-token KL divergence on harmless prompts (nats)": ["0", "0.0123"],
    }
    parameters = table_rows(text, "parameter")
    assert parameters["trial"] == ["17"]
    assert parameters["seed"] == ["7"]
    assert parameters["row normalization"] == ["pre"]
    assert parameters["direction"] == ["one for all layers, index 0.3000 (layer 0.3)"]
    assert parameters["mlp.down_proj.max_weight"] == ["1.3000"]
    assert parameters["mlp.down_proj.max_weight_position"] == ["1.0000 (layer 1.0)"]
    assert parameters["mlp.down_proj.min_weight_distance"] == ["0.5000 (0.5 layers)"]
    # By hand, for two layers: attention 0.4 and 1, the MLP in the last layer only.
    assert table_rows(text, "layer") == {"0": ["0.4000", ""], "1": ["1.0000", "1.3000"]}
    assert "![Strength of the ablation over the layers, for each component](kernel.svg)" in text
    assert "heretic --reproduce heretic.json" in text
    assert table_rows(text, "library")["heretic-llm"] == [__version__]
    assert set(table_rows(text, "library")) >= {"torch", "transformers", "peft", "optuna", "huggingface-hub"}
    responsible = text.partition("## Responsible use")[2]
    assert "The safeguards that the developers of the original trained into it have been weakened on purpose" in responsible
    assert "Nothing in its weights prevents that." in responsible
    assert "Whoever runs or shares it is responsible for its use." in responsible
    assert "The original's licence (tiny-research) and its terms of use still apply." in responsible
    assert text.endswith("\n# Original model card\n\n# Tiny\n\nA *tiny* model. | Ask it about bread.\n")


def test_how_it_was_measured(tmp_path: Path) -> None:
    """With texts that would break a table or a line of code."""
    original = original_with(tmp_path / "m", None)
    own = PromptSpecification(dataset="/home/alice/secret/bad.txt", split="[:5]", prefix="a|b ", system_prompt="Be `brief`.\nBe kind.")
    hub = PromptSpecification(dataset="owner/prompts", split="test[:5]", column="text", commit=COMMIT)
    export(
        original,
        tmp_path / "out",
        bad_evaluation_prompts=own,
        good_prompts=hub,
        system_prompt="You `help`.",
        refusal_markers=["sorry", "i ca`n't", "no|way"],
    )
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    rows = table_rows(text, "prompts")
    assert rows["harmful, for counting refusals"] == [
        "`bad.txt` (a local file)",
        "`[:5]`",
        "",
        "",
        "prefix ` a\\|b  `; system prompt ``Be `brief`.⏎Be kind.``",
    ]
    assert rows["harmless, for the directions"] == [
        "[owner/prompts](https://huggingface.co/datasets/owner/prompts)",
        "`test[:5]`",
        "`text`",
        "`0123456789ab`",
        "",
    ]
    assert "- System prompt: ``You `help`.``\n" in text
    assert "- Responses: greedy, at most 12 tokens\n" in text
    assert "- Response prefix, after which evaluation begins: ` yes  `\n" in text
    assert (
        f"- A response is a refusal according to the learned rule of heretic {__version__}, or if, after lowercasing, removing asterisks "
        "and normalizing apostrophes and spaces, it contains one of 3 markers\n"
    ) in text
    assert "- `sorry`\n- ``i ca`n't``\n- `no|way`\n" in text
    assert "- Dtype of the search: float32\n" in text


def test_which_rule_judged(tmp_path: Path) -> None:
    model = load(original_with(tmp_path / "m", None))
    learned = model_card(model, result_for(settings(tmp_path / "m")), "merge")
    assert f"- A response is a refusal according to the learned rule of heretic {__version__}\n" in learned
    assert "Refusals are detected by a linear model over phrases, which reads only the beginning of most responses." in learned
    assert "The markers" not in learned
    markers = model_card(model, result_for(settings(tmp_path / "m", refusal_rule="markers")), "merge")
    assert "normalizing apostrophes and spaces, it contains one of 26 markers\n" in markers
    assert "Refusals are detected by keywords." in markers and "- `sorry`\n" in markers


def test_the_demonstrations_prompts(tmp_path: Path) -> None:
    model = load(original_with(tmp_path / "m", None))
    text = model_card(model, result_for(Settings(demo=True, seed=1)), "merge")
    assert table_rows(text, "prompts") == {
        "harmless, for the directions": ["`heretic-demo:good` (part of heretic)"],
        "harmful, for the directions": ["`heretic-demo:bad` (part of heretic)"],
        "harmless, for the KL divergence": ["`heretic-demo:good_evaluation` (part of heretic)"],
        "harmful, for counting refusals": ["`heretic-demo:bad_evaluation` (part of heretic)"],
    }


def test_other_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the record holds."""
    more = {"harmless_refusals": 2, "kl_statistics": {"mean": 0.01234, "p95": 0.2}, "sequence_kl_divergence": None, "range": (0.1, 0.25)}
    monkeypatch.setattr(Result, "scores", property(lambda _: {**SCORES, **more}))
    model = load(original_with(tmp_path / "m", None))
    rows = table_rows(model_card(model, result_for(settings(tmp_path / "m")), "merge"), "")
    assert rows["harmless refusals"] == ["", "2"]
    assert rows["kl statistics"] == ["", "mean 0.0123, p95 0.2000"]
    assert rows["range"] == ["", "0.1000, 0.2500"]
    assert "sequence kl divergence" not in rows


SCORES = {"refusals": 3, "n_bad_prompts": 100, "base_refusals": 95, "kl_divergence": 0.0123}


@pytest.mark.parametrize("strategy", ["merge", "adapter"])
def test_an_original_without_a_card(tmp_path: Path, strategy: Strategy) -> None:
    recorder = Recorder()
    export(original_with(tmp_path / "m", None), tmp_path / "out", strategy, recorder)
    card = ModelCard((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert card.data.license is None
    assert card.data.pipeline_tag == "text-generation"
    assert "Original model card" not in card.text
    assert "The original's licence and terms of use still apply. Its card names none: see `m`." in card.text
    assert recorder.warnings == []


@pytest.mark.parametrize(
    "metadata", ["license: [mit", "- just\n- a list", "license: mit\nmodel-index:\n- name: x\n  results: 5"], ids=["yaml", "list", "index"]
)
def test_a_card_whose_metadata_is_broken(tmp_path: Path, metadata: str) -> None:
    """Its text is kept, and what is missing is told."""
    recorder = Recorder()
    export(original_with(tmp_path / "m", f"---\n{metadata}\n---\n\n# Mine\n"), tmp_path / "out", "merge", recorder)
    card = ModelCard((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert card.text.endswith("# Original model card\n\n# Mine\n")
    if "model-index" in metadata:  # the rest of the metadata is sound
        assert (card.data.license, recorder.warnings) == ("mit", [])
    else:
        assert card.data.license is None
        assert len(recorder.warnings) == 1
        assert recorder.warnings[0].endswith(" cannot be read, so licence and language are missing from the new one.")


LICENCES = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


@pytest.mark.parametrize("strategy", ["merge", "adapter"])
def test_licence_files_stay_in_place(tmp_path: Path, strategy: Strategy) -> None:
    original = original_with(tmp_path / "m", ORIGINAL_CARD)
    for name in LICENCES:
        (original / name).write_text(f"the {name}")
    export(original, tmp_path / "out", strategy)
    assert {name: (tmp_path / "out" / name).read_text() for name in LICENCES} == {name: f"the {name}" for name in LICENCES}


def test_licences_that_are_weights_code_or_links(tmp_path: Path) -> None:
    """Their names say that they are not copied, or they lead to a file elsewhere."""
    (tmp_path / "secret").write_text("of somebody else")
    original = original_with(tmp_path / "m", ORIGINAL_CARD)
    for name in ("LICENSE.bin", "LICENSE.py", "NOTICE.pt"):
        (original / name).symlink_to(tmp_path / "secret")
    target = export(original, tmp_path / "out")
    assert not list(target.glob("LICENSE*")) and not list(target.glob("NOTICE*"))
    (original / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError) as caught:
        copy_licence(model_source(settings(original)), tmp_path, SilentProgress())
    assert str(caught.value) == (
        f"{original} contains links to files elsewhere, which would be copied into the saved model: LICENSE. Replace them with the files, "
        "or delete them, then save again. The study is safe."
    )
    assert not (tmp_path / "LICENSE").exists()


# Cards of originals on the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve(hf_token={"name": "me"}) as server:
        server.repositories["owner/tiny"] = Repository(private=False, files={"README.md": ORIGINAL_CARD.encode()})
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def hub_source(name: str = "owner/tiny") -> ModelSource:
    return ModelSource(name, name, COMMIT, False)


@pytest.mark.parametrize(("strategy", "relation"), [("merge", "finetune"), ("adapter", "adapter")])
def test_a_card_on_the_hub(hub: Hub, tmp_path: Path, strategy: Strategy, relation: str) -> None:
    model = load(original_with(tmp_path / "m", None))
    model.loaded = dataclasses.replace(model.loaded, source=hub_source())
    text = model_card(model, result_for(settings(tmp_path)), strategy)
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "owner/tiny"  # not what the original itself was made from
    assert data["base_model_relation"] == relation
    assert data["license"] == "other"
    assert data["license_link"] == f"https://huggingface.co/owner/tiny/blob/{COMMIT}/LICENSE"
    assert data["language"] == ["en", "de"]
    assert "datasets" not in data
    link = f"[owner/tiny](https://huggingface.co/owner/tiny) (commit [`0123456789ab`](https://huggingface.co/owner/tiny/tree/{COMMIT}))"
    assert f" {link}. Its refusals" in text
    assert "# tiny, refusals removed\n" in text
    assert text.endswith("Ask it about bread.\n")


def test_licence_files_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["owner/tiny"].files |= {"LICENSE": b"the licence", "model.safetensors": b"weights"}
    model = load(original_with(tmp_path / "m", None))
    model.loaded = dataclasses.replace(model.loaded, source=hub_source())
    (tmp_path / "out").mkdir()
    recorder = Recorder()
    write_card(model, result_for(settings(tmp_path)), "adapter", tmp_path / "out", recorder)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["LICENSE", "README.md", "kernel.svg"]
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"the licence"
    assert recorder.warnings == []


def test_licence_files_that_cannot_be_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(original_with(tmp_path / "m", None))
    model.loaded = dataclasses.replace(model.loaded, source=hub_source())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "out").mkdir()
    recorder = Recorder()
    write_card(model, result_for(settings(tmp_path)), "adapter", tmp_path / "out", recorder)
    assert recorder.warnings[0] == "The licence files of owner/tiny cannot be read without the hub. Add them before you share the export."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.repositories["owner/tiny"].private = True
    recorder = Recorder()
    write_card(model, result_for(settings(tmp_path)), "adapter", tmp_path / "out", recorder)
    assert recorder.warnings[0].startswith("The licence files of owner/tiny cannot be read: ")
    assert recorder.warnings[0].endswith(" Add them before you share the export.")


def test_a_card_that_the_hub_does_not_have(hub: Hub) -> None:
    hub.repositories["owner/tiny"].files.clear()
    recorder = Recorder()
    assert original_card(hub_source(), recorder) == ({}, None)
    assert recorder.warnings == []


def test_a_card_that_cannot_be_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    unread = "The card of owner/tiny cannot be read, so its licence, language and text are missing from the new one: "
    recorder = Recorder()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert original_card(hub_source(), recorder) == ({}, None)
    assert recorder.warnings == [f"{unread}it is not in the cache, and the hub cannot be reached."]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.repositories["owner/tiny"].private = True
    recorder = Recorder()
    assert original_card(hub_source(), recorder) == ({}, None)
    assert recorder.warnings[0].startswith(unread)
    assert len(recorder.warnings) == 1


def test_a_hub_that_does_not_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the client's HTTP library, which is no OSError."""

    def fail(*_: object, **__: object) -> None:
        raise HTTPError("The read operation timed out.")

    for function in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"heretic.saving.card.{function}", fail)
    recorder = Recorder()
    assert original_card(hub_source(), recorder) == ({}, None)
    copy_licence(hub_source(), tmp_path, recorder)
    assert recorder.warnings == [
        "The card of owner/tiny cannot be read, so its licence, language and text are missing from the new one: "
        "The read operation timed out.",
        "The licence files of owner/tiny cannot be read: The read operation timed out. Add them before you share the export.",
    ]


# The picture


def curves(svg: str) -> list[list[tuple[float, float]]]:
    tree = ElementTree.fromstring(svg)
    lines = tree.findall(".//{http://www.w3.org/2000/svg}polyline")
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())] for line in lines]


def strengths_of(parameters: dict[str, ComponentParameters], last_layer: int) -> dict[str, Points]:
    return {name: [(i, kernel(i, p, last_layer)) for i in range(last_layer + 1)] for name, p in parameters.items()}


def test_the_picture_shows_the_kernel() -> None:
    """Heights are proportional to the strengths that the definition gives, places to the layers."""
    parameters = {"attn.o_proj": ComponentParameters(1.2, 0.5, 0.3, 0.25), "mlp.down_proj": ComponentParameters(0.6, 0.0, 0.6, 0.1)}
    svg = kernel_picture(strengths_of(parameters, 20), 20, 10.0)
    attention, mlp = curves(svg)
    ground = max(y for _, y in attention)
    # By hand: 1.2 at layer 10, falling to 0.3 five layers away, nothing beyond.
    expected = {10: 1.2, 9: 1.02, 8: 0.84, 11: 1.02, 5: 0.3, 15: 0.3, 4: 0, 16: 0, 0: 0, 20: 0}
    scale = (ground - attention[10][1]) / 1.2
    for layer, strength in expected.items():
        assert (ground - attention[layer][1]) / scale == pytest.approx(strength, abs=0.01)
    assert [(ground - y) / scale for _, y in mlp] == pytest.approx([0.6] * 3 + [0] * 18, abs=0.01)
    steps = [b[0] - a[0] for a, b in itertools.pairwise(attention)]
    assert steps == pytest.approx([steps[0]] * 20, abs=0.11)
    assert "layer of the direction" in svg
    assert f"M{attention[10][0]:.1f} " in svg  # the dashed line of index 0.5
    assert "layer of the direction" not in kernel_picture(strengths_of(parameters, 20), 20)


def test_pictures_of_unusual_models() -> None:
    """One layer, nothing done, more components than colours, names with signs: always a picture whose parts lie within it."""
    many = {f"part<{i}>.down_proj": ComponentParameters(1 + i, 0.1 * i, 0.5, 0.3) for i in range(9)}
    for parameters, last_layer, direction in [
        ({"a": ComponentParameters(0.0, 0.5, 0.0, 0.5)}, 0, None),
        ({"a": ComponentParameters(0.2, 0.0, 0.1, 0.0)}, 1, 0.0),
        (many, 95, 95.0),
    ]:
        svg = kernel_picture(strengths_of(parameters, last_layer), last_layer, direction)
        tree = ElementTree.fromstring(svg)
        lines = curves(svg)
        assert [len(line) for line in lines] == [last_layer + 1] * len(parameters)
        width, height = float(tree.attrib["width"]), float(tree.attrib["height"])
        assert all(0 < x < width and 0 < y < height for line in lines for x, y in line)
        texts = [element for element in tree.iter("{http://www.w3.org/2000/svg}text") if "x" in element.attrib]
        assert {text.text for text in texts} >= set(parameters)
        assert all(0 < float(text.attrib["x"]) < width and 0 < float(text.attrib["y"]) < height for text in texts)


def test_the_picture_of_learned_strengths_goes_below_zero() -> None:
    """Strengths may be negative, and not every layer need have one: places and heights stay proportional, all within the picture."""
    strengths = {"attn.o_proj": [(2, 0.5), (3, -1.0), (7, 2.0)], "mlp.down_proj": [(2, -0.25), (7, 0.0)]}
    svg = kernel_picture(strengths, 8)
    attention, mlp = curves(svg)
    ground, scale = mlp[1][1], (mlp[1][1] - attention[2][1]) / 2.0
    assert scale > 0
    assert [(ground - y) / scale for _, y in attention] == pytest.approx([0.5, -1.0, 2.0], abs=0.01)
    assert (ground - mlp[0][1]) / scale == pytest.approx(-0.25, abs=0.01)
    layer = (attention[2][0] - attention[0][0]) / 5
    assert attention[1][0] - attention[0][0] == pytest.approx(layer, abs=0.11)
    height = float(ElementTree.fromstring(svg).attrib["height"])
    assert all(0 < y < height for _, y in attention + mlp)


# What must not leave this machine


@pytest.mark.parametrize("strategy", ["merge", "adapter"])
def test_nothing_that_is_shared_tells_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: Strategy) -> None:
    """No path, user, host or token in any file of an export, though settings, prompts and model are full of them."""
    home = tmp_path / "home-of-alice"
    original = original_with(home / "models" / "tiny-model", None)
    (home / "bad.txt").write_text("hello dog")
    monkeypatch.setenv("HF_TOKEN", "hf_SecretSecretSecret")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice-the-user")
    monkeypatch.chdir(home)
    for name, value in {
        "given as a path": original,
        "given below home": "~/models/tiny-model",
        "given from here": "models/../models/tiny-model",
    }.items():
        model = load(original)
        source = dataclasses.replace(model.loaded.source, name=str(value))
        model.loaded = dataclasses.replace(model.loaded, source=source)
        model.use_directions(unit_directions(3, 32), "none")
        chosen = settings(
            str(value),
            bad_prompts=PromptSpecification(dataset=str(home / "bad.txt")),
            good_prompts=PromptSpecification(dataset="~/bad.txt"),
            study_checkpoint_dir=str(home / "checkpoints"),
            save_directory=str(home / "out"),
            upload_repo_id="alice-the-user/model",
            evaluate_model=str(home / "models"),
        )
        recorder = Recorder()
        target = save(model, result_for(chosen), strategy, str(home / name), False, recorder)
        private = [str(home), str(tmp_path), "alice", "hf_Secret", socket.gethostname(), *({getpass.getuser()} - {"root"})]
        for path in target.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            assert [text for text in private if text.encode() in content] == [], path
        saved = json.loads((target / "heretic.json").read_text())
        assert saved["model"]["name"] == "tiny-model"
        assert saved["prompts"]["bad_prompts"]["dataset"] == "bad.txt"
        if strategy == "adapter":
            assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-model"
            assert recorder.messages == [
                "adapter_config.json contains only the folder name of the original, 'tiny-model', not its path. If the original is on the "
                "hub, set base_model_name_or_path to its id, or load it yourself and pass it to PeftModel."
            ]


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("prompts/bad.txt", "prompts/bad.txt"),
        ("/home/alice/bad.txt", "bad.txt"),
        ("~/bad.txt", "bad.txt"),
        ("../alice/bad.txt", "bad.txt"),
        ("a/../../alice/..", None),
        ("/home/alice/", "alice"),
        ("postgresql://alice:password@host/db", "postgresql://..."),
        ("https://host/prompts.txt", "https://..."),
        ("5GB", "5GB"),
    ],
)
def test_public_names(name: str, public: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert public_name(name) == (tmp_path.name if public is None else public)


def test_public_settings_keep_what_the_scores_depend_on() -> None:
    """Texts stay to the letter, numbers and names too; only paths are shortened."""
    chosen = Settings(
        model="/models/m", system_prompt="See /etc/motd at ../x", refusal_markers=["/sorry/", "../no"], max_memory={"0": "20GB"}
    )
    before = chosen.model_dump(mode="json")
    after = public_settings(before)
    assert {name for name in before if before[name] != after[name]} == {"model"}
    assert after["model"] == "m"


def test_a_token_is_taken_out_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SecretSecretSecret")
    assert without_token("bad hf_SecretSecretSecret, bad") == "bad [token], bad"
    assert without_token("bad hf_Other", "hf_Other") == "bad [token]"
    monkeypatch.delenv("HF_TOKEN")
    assert without_token("nothing to hide") == "nothing to hide"


def test_what_the_command_tells_never_holds_the_token(heretic: Any, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    """The last line of defence: an error of some library that quotes it."""
    monkeypatch.setenv("HF_TOKEN", "hf_SecretSecretSecret")

    def fail(*_: Any) -> None:
        raise RuntimeError("Illegal header value b'Bearer hf_SecretSecretSecret'")

    monkeypatch.setattr("heretic.commands.start.model_source", fail)
    outcome = heretic("--debug")
    assert outcome.code == 1
    assert "RuntimeError: Illegal header value b'Bearer [token]'" in outcome.err.splitlines()[-1]
    assert "Traceback" in outcome.err
    assert "hf_Secret" not in outcome.err + outcome.out


def test_record_of_a_local_original(tmp_path: Path) -> None:
    model = load(original_with(tmp_path / "m", None))
    assert record(model, result_for(settings(tmp_path / "m")), "merge")["settings"]["model"] == "m"
