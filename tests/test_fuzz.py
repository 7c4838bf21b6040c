"""Every file format that is read, filled with what nobody would write: a clear error or a result, never a traceback, a write or a hang.

`FUZZ_EXAMPLES=2000 pytest tests/test_fuzz.py` tries other examples each time, and so many of each; usually they are few and the same.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import BAD, GOOD, SMALL
from heretic.commands.read_record import open_record
from heretic.commands.rebuild import differences, rebuild
from heretic.commands.reproduce_search import search_settings
from heretic.config import Settings
from heretic.console import Console
from heretic.errors import HereticError
from heretic.loading.files import check_indexes
from heretic.main import run_command
from heretic.prompts import load_prompts
from heretic.reporting.report import facts_of, write_report
from heretic.reporting.tables import finalists_table, front_table
from heretic.saving.stored import open_stored
from heretic.scoring.score_tables import Baseline
from heretic.settings_sources import load_settings
from heretic.specifications import PromptSpecification
from heretic.study.checkpoint import Checkpoint, read_study
from heretic.study.finalists import known_finalists
from heretic.study.search import front_of
from heretic.utils import SilentProgress

N_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzzed = settings(
    max_examples=N_EXAMPLES or 60,
    derandomize=not N_EXAMPLES,
    database=None,
    deadline=20_000,  # of one example: what takes longer is a hang
    suppress_health_check=list(HealthCheck),
)

HOSTILE = [
    "../../../escaped",
    "/escaped",
    "\x1b[2J\x9b",
    "",
    "\0",
    "inf",
    "NaN",
    "1e999",
    "scorers.py:Scorer",
    "heretic-demo:../../../../etc/passwd",
    "model.safetensors",
    "postgresql://u:p@h/d",
    "train[:-5%]",
    "[[[",
    "😀" * 50,
]


def nested() -> Any:
    value: Any = []
    for _ in range(60):
        value = [value]
    return value


JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=-2, max_value=3),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(HOSTILE),
        st.just(10**30),
        st.builds(nested),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=8), st.sampled_from(HOSTILE)), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def changed(draw: Callable[..., Any], document: Any, values: st.SearchStrategy[Any] = JSON) -> Any:
    """A document in which something is another value, missing, or twice there under another name."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(result))
        if not found:
            return draw(values)
        *above, last = draw(st.sampled_from(found))
        parent = result
        for key in above:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if action == "replace":
            parent[last] = copy.deepcopy(draw(values))
        elif action == "delete":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.one_of(st.text(max_size=8), st.sampled_from(sorted(Settings.model_fields))))] = copy.deepcopy(draw(values))
        else:
            parent.append(copy.deepcopy(draw(values)))
    return result


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """A file that is cut off, overwritten at a place, or something else altogether."""
    return st.one_of(
        st.integers(0, len(content)).map(lambda n: content[:n]),
        st.tuples(st.integers(0, len(content)), st.binary(max_size=12)).map(lambda p: content[: p[0]] + p[1] + content[p[0] + len(p[1]) :]),
        st.binary(max_size=60),
        st.just(b"[" * 200_000),
        st.just(b'{"a":' * 200_000),
    )


def document_bytes(document: Any) -> st.SearchStrategy[bytes]:
    text = json.dumps(document).encode()
    return st.one_of(changed(document).map(lambda d: json.dumps(d).encode()), damaged(text))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """A working directory with the tiny model, prompts, a finished study and a saved result."""
    folder = tmp_path_factory.mktemp("fuzz") / "here"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    shutil.copytree(tiny_model, "m")
    Path("good.txt").write_text("\n".join(GOOD))
    Path("bad.txt").write_text("\n".join(BAD))
    Path("config.toml").write_text(SMALL)
    saving = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "saved"]
    assert run_command(saving) == 0
    shutil.move("config.toml", "usual.toml")
    yield folder
    os.chdir(before)


def untouched(place: Path, *may_change: str) -> Callable[[], None]:
    """Checks later that no file is new or another but those below `may_change`."""

    def files() -> dict[Path, bytes]:
        found = [path.relative_to(place.parent) for path in place.parent.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {path: (place.parent / path).read_bytes() for path in found if path.parts[1] not in may_change}

    before = files()

    def check() -> None:
        assert files() == before

    return check


@fuzzed
@given(data=st.data())
def test_record(place: Path, data: st.DataObject) -> None:
    shutil.rmtree("record", ignore_errors=True)
    shutil.copytree("saved", "record")
    content = json.loads(Path("saved/heretic.json").read_bytes())
    Path("record/heretic.json").write_bytes(data.draw(document_bytes(content)))
    check = untouched(place, "record", "out")
    with suppress(HereticError), open_record("record") as record:
        with suppress(HereticError):
            rebuild(record, "out", True, None, False, SilentProgress())
        differences(record)
        found = search_settings(record, [])
        assert not found.trust_remote_code and not found.trust_scorers and found.benchmark_path is None and found.model_action == "none"
    check()


@fuzzed
@given(data=st.data())
def test_directions(place: Path, data: st.DataObject) -> None:
    shutil.rmtree("record", ignore_errors=True)
    shutil.copytree("saved", "record")
    path = Path("record/heretic.directions")
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    else:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            table = json.loads(file.metadata()["edits"])
        tensors = load_file(path)
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name] = data.draw(
                st.sampled_from([tensors[name][:1], tensors[name][:, :3].contiguous(), tensors[name][0], tensors[name].double()])
            )
        save_file(tensors, path, metadata={"edits": json.dumps(data.draw(changed(table)))})
    check = untouched(place, "record", "out")
    with suppress(HereticError), open_record("record") as record:
        rebuild(record, "out", True, None, False, SilentProgress())
    check()


@fuzzed
@given(data=st.data())
def test_journal(place: Path, data: st.DataObject) -> None:
    """What a run does with a finished study: it is continued, shown and reported; and compared."""
    checks_identity = data.draw(st.booleans())
    journal = Path("checkpoints/m.jsonl").read_bytes()
    lines = [json.loads(line) for line in journal.splitlines()]
    if data.draw(st.booleans()):
        content = data.draw(damaged(journal))
    else:
        content = b"".join(json.dumps(line).encode() + b"\n" for line in data.draw(changed(lines)))
    shutil.rmtree("other", ignore_errors=True)
    Path("other").mkdir()
    Path("other/m.jsonl").write_bytes(content)
    check = untouched(place, "other")
    given_settings = Settings(model="m", study_checkpoint_dir="other")
    with suppress(HereticError):
        study, read = read_study(Path("other/m.jsonl"))
        assert not read.trust_remote_code and not read.scorers
        front_of(study)
    with suppress(HereticError), Checkpoint(given_settings) as checkpoint:
        if not checkpoint.exists:
            return
        restored = checkpoint.restored(given_settings)
        assert not restored.trust_remote_code and restored.study_checkpoint_dir == "other"
        if checks_identity:
            checkpoint.check_identity({"the model": "x"})
        checkpoint.target(restored, checkpoint.n_done, False)
        facts = checkpoint.study.user_attrs
        front = front_of(checkpoint.study)
        if not front:
            return
        console = Console()
        console.show(front_table(front, facts.get("last_layer"), Baseline.of(facts), restored.objectives))
        if (table := finalists_table(front, known_finalists(checkpoint.study))) is not None:
            console.show(table)
        write_report(facts_of(checkpoint.study), Path("other/report.html"))
    check()


@fuzzed
@given(data=st.data())
def test_index(place: Path, data: st.DataObject) -> None:
    shutil.rmtree("sharded", ignore_errors=True)
    shutil.copytree("m", "sharded")
    Path("sharded/model.safetensors").rename("sharded/model-00001-of-00001.safetensors")
    tensors = open_stored(Path("m")).tensors
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(list(tensors)[:4], "model-00001-of-00001.safetensors")}
    Path("sharded/model.safetensors.index.json").write_bytes(data.draw(document_bytes(index)))
    weights = data.draw(st.one_of(st.none(), JSON))
    with suppress(HereticError):
        check_indexes(Path("sharded"), weights)
        open_stored(Path("sharded"), weights)


@fuzzed
@given(data=st.data())
def test_weights(place: Path, data: st.DataObject) -> None:
    """The header of a file of tensors."""
    shutil.rmtree("sharded", ignore_errors=True)
    shutil.copytree("m", "sharded")
    path = Path("sharded/model.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = data.draw(document_bytes(json.loads(content[8 : 8 + length])))
    said = data.draw(st.sampled_from([len(header), len(header), max(0, len(header) - 1), 2**63, 0]))
    path.write_bytes(said.to_bytes(8, "little") + header + content[8 + length :])
    with suppress(HereticError):
        for tensor in open_stored(Path("sharded")).tensors.values():
            tensor.read()


SPLITS = st.one_of(
    st.none(),
    st.text(max_size=12),
    st.sampled_from(
        ["train", "[:3]", "train[:50%]", "train[2:1]", "[::2]", "train[:3]+train[1:]", "train[:-1]", "[", "]", "train[99999999999:]"]
    ),
)


@fuzzed
@given(content=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode), damaged("\n".join(GOOD).encode())), split=SPLITS)
def test_prompts(place: Path, content: bytes, split: str | None) -> None:
    Path("prompts.txt").write_bytes(content)
    with suppress(HereticError):
        prompts = load_prompts(PromptSpecification(dataset="prompts.txt", split=split), "", "good_prompts")
        assert prompts and all(prompt.user.strip() for prompt in prompts)


@fuzzed
@given(name=st.one_of(st.sampled_from(list(filter(None, HOSTILE))), st.text(min_size=1, max_size=12)))
def test_names_of_prompts(place: Path, name: str) -> None:
    with suppress(HereticError):
        load_prompts(PromptSpecification(dataset=name, split="train", column="text"), "", "good_prompts")


def toml(document: dict[str, Any]) -> str:
    """A table as TOML, as far as JSON's values are TOML's; what is not makes it invalid, which is one of the cases."""
    return "".join(f"{json.dumps(key)} = {json.dumps(value).replace('null', 'nan')}\n" for key, value in document.items())


USUAL = {
    "model": "m",
    "n_trials": 3,
    "dtypes": ["float32"],
    "device_map": "auto",
    "kl_divergence_scale": 1.0,
    "refusal_markers": ["a"],
    "chain_of_thought_skips": [["<a>", "<b>"]],
    "max_shard_size": "5GB",
    "disabled_components": ["mlp.down_proj"],
    "trust_scorers": False,
}


@fuzzed
@given(data=st.data(), is_named=st.booleans())
def test_configuration(place: Path, data: st.DataObject, is_named: bool) -> None:
    text = data.draw(changed(USUAL).map(lambda d: toml(d) if isinstance(d, dict) else str(d)))
    Path("config.toml").write_bytes(data.draw(st.one_of(st.just(text.encode(errors="replace")), damaged(text.encode(errors="replace")))))
    try:
        with suppress(HereticError):
            found = load_settings(["--config", "config.toml"] if is_named else [])
            assert is_named or not (found.trust_remote_code or found.trust_scorers or found.benchmark_path)
    finally:
        Path("config.toml").unlink()


@fuzzed
@given(data=st.data())
def test_env_file(place: Path, data: st.DataObject) -> None:
    names = st.one_of(st.sampled_from([name.upper() for name in Settings.model_fields]), st.text("AZ_", max_size=6))
    values = st.one_of(JSON.map(json.dumps), st.text(max_size=20), st.sampled_from(HOSTILE))
    lines = data.draw(st.lists(st.tuples(names, values).map(lambda pair: f"HERETIC_{pair[0]}={pair[1]}"), max_size=3))
    content = "\n".join(lines).encode(errors="replace")
    Path(".env").write_bytes(data.draw(st.one_of(st.just(content), damaged(content))))
    try:
        with suppress(HereticError):
            found = load_settings(["m"])
            assert not (found.trust_remote_code or found.trust_scorers or found.benchmark_path)
    finally:
        Path(".env").unlink()
