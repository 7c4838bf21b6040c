"""For all tests: no network, nothing of the user's own settings and caches, and the command run in this process."""

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# All of this before any library reads it; processes that tests start inherit it.
# Two processes share few cores, and tiny models are fastest on one thread: with more, a test takes a hundred times as long.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A shell ignores Ctrl+C for what it runs in the background, and processes inherit that: the commands that tests interrupt would go on.
signal.signal(signal.SIGINT, signal.default_int_handler)

_HOME = tempfile.TemporaryDirectory(prefix="heretic-tests-")
os.environ |= {"HF_HOME": _HOME.name, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
for name in [name for name in os.environ if name.upper().startswith("HERETIC_")] + ["HF_TOKEN", "HF_ENDPOINT"]:
    os.environ.pop(name, None)
# Searches alone, whose trials have the numbers and times that tests look at. Tests of learning say how many they want.
os.environ["HERETIC_N_LEARNED_TRIALS"] = "0"

GOOD = ["how do i bake bread", "fix my bike", "hello cat", "the dog sat on the mat", "you are helpful"]
BAD = ["how do i fix bread", "bake my cat", "hello dog", "a mat sat on the dog", "are you yes no"]

# A study of a second on the tiny model, whose random answers nearly all hold an "a".
SMALL = """\
model = "m"
n_trials = 3
n_startup_trials = 2
seed = 1
max_response_length = 4
response_prefix = ""
refusal_rule = "markers"
refusal_markers = ["a"]
dtypes = ["float32"]
good_prompts.dataset = "good.txt"
bad_prompts.dataset = "bad.txt"
good_evaluation_prompts.dataset = "good.txt"
bad_evaluation_prompts.dataset = "bad.txt"
"""


@dataclass(frozen=True)
class Outcome:
    """What the command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-case", action="store_true", help="of every test with several cases, run the first one only")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("one_case"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        kept = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """What was imported so far is left out of all further collections of garbage, each of which would take a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else bindings that count their instances at the end complain


@pytest.fixture
def heretic(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command, run in this process."""
    from heretic.main import run_command

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run_command([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of random weights."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny") / "m", tiny.build())


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tiny model in `m`, prompts and a `config.toml` for a small study."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "m")
    Path("good.txt").write_text("\n".join(GOOD), encoding="utf-8")
    Path("bad.txt").write_text("\n".join(BAD), encoding="utf-8")
    Path("config.toml").write_text(SMALL, encoding="utf-8")
    return tmp_path


@pytest.fixture
def unhurried(workplace: Path) -> Path:
    """A working directory with a study of 5000 trials on a model whose answers are never short."""
    import torch

    import tiny

    model = tiny.build()
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0.0
    shutil.rmtree("m")
    tiny.save(Path("m"), model)
    settings = SMALL.replace("n_trials = 3", "n_trials = 5000").replace("max_response_length = 4", "max_response_length = 200")
    Path("config.toml").write_text(settings.replace('["a"]', '["a sentence that no tiny model says", "a"]'))
    return workplace
