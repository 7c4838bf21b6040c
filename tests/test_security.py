"""What is trusted and what is not: a test for each row of docs/security.md."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import create_trial

from conftest import SMALL, Outcome
from heretic.config import Settings
from heretic.errors import ExportError, ModelError, UsageError
from heretic.settings_sources import load_settings
from heretic.specifications import ScorerSpecification
from heretic.study.checkpoint import Checkpoint
from heretic.study.journal import JournalLock
from heretic.study.stored_settings import DEFINING, NEVER_STORED, PER_RUN
from heretic.utils import screen_text

Heretic = Callable[..., Outcome]

HOSTILE_MODULE = "from pathlib import Path\nPath(r'{marker}').write_text('it ran')\n"
SCORER = """
from heretic.scoring.scorers import Scorer, ScorerSettings


class Mine(Scorer):
    class Settings(ScorerSettings):
        api_key: str = ""

    def score(self, outputs):
        return float(len(outputs.harmless_prompts) if hasattr(outputs, "harmless_prompts") else 1)
"""
KEY = "sk-everyday-0815"
PROMPTS = [
    part
    for name, file in (("good", "good"), ("bad", "bad"), ("good-evaluation", "good"), ("bad-evaluation", "bad"))
    for part in (f"--{name}-prompts.dataset", f"{file}.txt")
]


@pytest.fixture
def marker(workplace: Path) -> Path:
    """A file that code which runs uninvited leaves. That code is `hostile.py`, a scorer, and the working directory holds it."""
    path = workplace / "ran"
    Path("hostile.py").write_text(HOSTILE_MODULE.format(marker=path))
    return path


def own_code(folder: Path, marker: Path) -> Path:
    """A model that brings its own code, which leaves `marker`."""
    shutil.copytree("m", folder)
    (folder / "hostile.py").write_text(HOSTILE_MODULE.format(marker=marker))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "hostile.C", "AutoModelForCausalLM": "hostile.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_record(**settings: Any) -> Path:
    """A record of a search on the tiny model, as somebody may have written it."""
    folder = Path("record")
    folder.mkdir()
    content = {
        "model": {"name": "m", "commit": None, "fingerprint": "config.json:0"},
        "settings": {"model": "m", "refusal_markers": ["a"], "seed": 1, "n_trials": 3, **settings},
        "prompts": {},
        "trial": {"number": 0, "direction_index": None, "parameters": {}},
        "scores": {"refusals": 1, "kl_divergence": 0.1},
        "versions": {},
        "export_strategy": "merge",
        "files": {},
    }
    (folder / "heretic.json").write_text(json.dumps(content))
    return folder


def write_study(folder: str = "checkpoints", **settings: Any) -> Path:
    """A journal with one finished trial, as somebody may have written it."""
    prompts = {f"{name}_prompts": {"dataset": f"{name.split('_')[0]}.txt"} for name in ("good", "bad", "good_evaluation", "bad_evaluation")}
    chosen = Settings(**{"model": "m", "refusal_markers": ["a"], "study_checkpoint_dir": folder, "n_trials": 1, **prompts, **settings})
    parameters = {"attn.o_proj": {"max_weight": 1.0, "max_weight_position": 0.5, "min_weight": 0.0, "min_weight_distance": 0.5}}
    with Checkpoint(chosen) as checkpoint:
        study = checkpoint.create(chosen, {})
        study.set_user_attr("settings", chosen.model_dump(mode="json"))
        scores = dict.fromkeys(chosen.scorers, 0.0)
        attributes = {"refusals": 1, "kl_divergence": 0.1, "direction_index": None, "parameters": parameters, "scores": scores}
        study.add_trial(create_trial(values=[0.1] * len(chosen.objectives), user_attrs=attributes))
        return checkpoint.path


# Model files


def test_model_code(marker: Path, heretic: Heretic) -> None:
    own_code(Path("own"), marker)
    outcome = heretic("own")
    assert outcome.code == 1
    assert outcome.err == "Error: The model own needs its own Python code. Read it, and if you trust it, add --trust-remote-code.\n"
    assert not marker.exists()
    heretic("own", "--trust-remote-code")
    assert marker.exists()


def test_kernels(workplace: Path, heretic: Heretic) -> None:
    config = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps({**config, "attn_implementation": "somebody/kernel"}))
    told = (
        "Error: The configuration of m names code from the hub, the kernel somebody/kernel. Read it, and if you trust it, add "
        "--trust-remote-code.\n"
    )
    outcome = heretic()
    assert (outcome.code, outcome.err) == (1, told)


def test_modules_that_adapters_name(workplace: Path, heretic: Heretic) -> None:
    Path("adapter").mkdir()
    described = {"base_model_name_or_path": "m", "peft_type": "LORA", "megatron_config": {"x": 1}, "megatron_core": "hostile"}
    Path("adapter/adapter_config.json").write_text(json.dumps(described))
    told = "Error: The adapter adapter cannot be used: adapter/adapter_config.json has a megatron_config, which names code to run.\n"
    outcome = heretic("compare", "m", "adapter")
    assert (outcome.code, outcome.err) == (1, told)


@pytest.mark.parametrize("name", ["../secret.safetensors", "ABSOLUTE", "sub/x.safetensors", "..", "C:x.safetensors", "a\\b.safetensors", 7])
def test_names_of_weight_files(name: Any, workplace: Path, heretic: Heretic) -> None:
    """An index may not lead out of the folder: neither when the model is loaded, nor when its copy is written."""
    from heretic.saving.stored import open_stored

    foreign = workplace / "secret.safetensors"
    shutil.copy("m/model.safetensors", foreign)
    before = foreign.read_bytes()
    name = str(foreign) if name == "ABSOLUTE" else name
    Path("m/model.safetensors").unlink()
    Path("m/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    told = f"m/model.safetensors.index.json names the file {name!r}. Only plain file names in the model's own folder are allowed."
    with pytest.raises(ModelError) as caught:
        open_stored(Path("m"))
    assert str(caught.value) == told
    assert heretic().err == f"Error: {told}\n"
    assert foreign.read_bytes() == before

    Path("m/model.safetensors.index.json").unlink()
    config = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    outcome = heretic()
    assert outcome.err == f"Error: m/config.json names the file {name!r}. Only plain file names in the model's own folder are allowed.\n"
    with pytest.raises(ModelError, match="Only plain file names"):
        open_stored(Path("m"), name)


def test_links_in_a_model_folder(workplace: Path) -> None:
    from heretic.loading.source import model_source
    from heretic.saving.original import open_original
    from heretic.utils import SilentProgress

    (workplace / "secret").write_text("of somebody else")
    source = model_source(Settings(model="m"))
    for name in ("notes.txt", "README.md", "LICENSE"):
        link = Path("m", name)
        link.symlink_to(workplace / "secret")
        with pytest.raises(ExportError) as caught:
            open_original(source, SilentProgress())
        assert str(caught.value) == (
            f"m contains links to files elsewhere, which would be copied into the saved model: {name}. Replace them with the "
            "files, or delete them, then save again. The study is safe."
        )
        link.unlink()
    Path("m/alias.json").symlink_to("config.json")
    assert "alias.json" in open_original(source, SilentProgress()).files


def test_links_in_the_hubs_cache(workplace: Path) -> None:
    """There every file is a link to the model's own blobs."""
    from heretic.loading.source import model_source
    from heretic.saving.original import open_original
    from heretic.utils import SilentProgress

    snapshot = workplace / "models--owner--m" / "snapshots" / "0123"
    shutil.copytree("m", workplace / "models--owner--m" / "blobs")
    snapshot.mkdir(parents=True)
    for path in (workplace / "models--owner--m" / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    original = open_original(model_source(Settings(model=str(snapshot))), SilentProgress())
    assert "tokenizer.json" in original.files


# Records


def test_trust_in_a_record(marker: Path, heretic: Heretic) -> None:
    own_code(Path("own"), marker)
    record = write_record(model="own", trust_remote_code=True, trust_scorers=True)
    outcome = heretic("--reproduce-search", record, *PROMPTS)
    assert outcome.code == 1
    assert outcome.err == "Error: The model own needs its own Python code. Read it, and if you trust it, add --trust-remote-code.\n"
    assert not marker.exists()


def test_scorers_in_a_record(marker: Path, heretic: Heretic) -> None:
    record = write_record(scorers={"mine": {"use": "hostile.py:Mine"}}, trust_scorers=True)
    outcome = heretic("--reproduce-search", record, *PROMPTS)
    told = (
        "Error: The record names code to run: scorers.mine.use = hostile.py:Mine. It only runs with your consent. Read it, and if you "
        "trust it, add --trust-scorers.\n"
    )
    assert (outcome.code, outcome.err) == (2, told)
    assert not marker.exists()
    # Named on the command line, it is the user's.
    for arguments in (["--trust-scorers"], ["--scorers", '{"mine": {"use": "hostile.py:Mine"}}']):
        outcome = heretic("--reproduce-search", record, *PROMPTS, *arguments)
        assert outcome.err.endswith("hostile.py has no Mine.\n")
        assert marker.exists()
        marker.unlink()
        for name in [name for name in sys.modules if name.startswith("heretic_scorers_")]:
            del sys.modules[name]


def test_places_in_a_record(workplace: Path) -> None:
    """Only what the scores and the search depend on is taken over."""
    from heretic.commands.read_record import open_record
    from heretic.commands.reproduce_search import search_settings

    places = {
        "study_checkpoint_dir": "/somewhere",
        "residual_plot_path": "/somewhere",
        "plot_residuals": True,
        "save_directory": "/somewhere",
        "overwrite": True,
        "model_action": "save",
        "upload_repo_id": "some/body",
        "study_storage": "postgresql://elsewhere/db",
        "benchmark_path": "/somewhere",
        "device_map": "disk",
        "max_memory": {"cpu": "1GB"},
        "workers": 64,
        "print_responses": True,
    }
    with open_record(str(write_record(kl_tokens=3, sampler="random", **places))) as record:
        settings = search_settings(record, PROMPTS)
    usual = Settings(model="m")
    assert {name: getattr(settings, name) for name in places if name not in ("study_checkpoint_dir", "model_action")} == {
        name: getattr(usual, name) for name in places if name not in ("study_checkpoint_dir", "model_action")
    }
    assert Path(settings.study_checkpoint_dir) == Path("checkpoints/reproduced")
    assert (settings.model_action, settings.kl_tokens, settings.sampler, settings.seed) == ("none", 3, "random", 1)


def test_prompt_files_in_a_record(workplace: Path, heretic: Heretic) -> None:
    record = write_record(good_prompts={"dataset": "/etc/hostname"}, bad_prompts={"dataset": "good.txt"})
    outcome = heretic("--reproduce-search", record, *PROMPTS[4:])
    told = (
        "Error: The record names local files or folders as prompts. If they are those of the study, add: "
        "--good-prompts.dataset /etc/hostname --bad-prompts.dataset good.txt\n"
    )
    assert (outcome.code, outcome.err) == (2, told)


def test_links_beside_a_record(workplace: Path, heretic: Heretic) -> None:
    record = write_record()
    (workplace / "secret").write_text("of somebody else")
    (record / "README.md").symlink_to(workplace / "secret")
    outcome = heretic("--export-from", record, "--save-directory", "out")
    assert outcome.code == 1 and outcome.err.startswith("Error: record contains links to files elsewhere, which would be copied into")
    assert not Path("out").exists()


# Journals


def test_every_setting_is_one_that_a_journal_may_or_may_not_say() -> None:
    """A new setting has to be put on one side."""
    harmless = {
        "compile_decoding",
        "dtypes",
        "device_map",
        "max_memory",
        "batch_size",
        "max_batch_size",
        "trials_per_batch",
        "stop_dominated_trials",
        "n_finalists",
        "final_response_length",
        "final_kl_tokens",
        "final_good_prompts",
        "final_bad_prompts",
        "full_normalization_lora_rank",
        "n_learned_trials",
        "n_trials",
        "n_startup_trials",
        "sampler",
        "first_trials",
        "seed",
        "worker_timeout",
        "max_shard_size",
    }
    sides = [*DEFINING, *PER_RUN, *NEVER_STORED, *harmless]
    assert len(sides) == len(set(sides)) and set(sides) == set(Settings.model_fields)


def test_trust_in_a_journal(marker: Path, heretic: Heretic) -> None:
    own_code(Path("own"), marker)
    shutil.move("config.toml", "mine.toml")
    path = write_study(model="own", trust_remote_code=True)
    told = "Error: The model own needs its own Python code. Read it, and if you trust it, add --trust-remote-code.\n"
    outcome = heretic("compare", "m", path, "--config", "mine.toml")
    assert (outcome.code, outcome.err) == (1, told)
    assert not marker.exists()


def test_scorers_in_a_journal(marker: Path, heretic: Heretic) -> None:
    Path("config.toml").unlink()
    path = write_study(scorers={"mine": {"use": "hostile.py:Mine"}}, trust_scorers=True, report=False)
    outcome = heretic("m")
    told = (
        f"Error: The study {path} names code to run: scorers.mine.use = hostile.py:Mine. It only runs with your consent. Read it, and if "
        "you trust it, add --trust-scorers.\n"
    )
    assert (outcome.code, outcome.err) == (2, told)
    assert not marker.exists()
    assert heretic("m", "--trust-scorers").err.endswith("hostile.py has no Mine.\n")
    assert marker.exists()


def test_scorers_in_a_shared_study(marker: Path, heretic: Heretic) -> None:
    from heretic.study.checkpoint import SHARED

    path = write_study(scorers={"mine": {"use": "hostile.py:Mine"}}, trust_scorers=True, trust_remote_code=True)
    # Optuna's own lock would wait half a minute for the file that ours leaves.
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=JournalLock(path))
    optuna.load_study(study_name="heretic", storage=optuna.storages.JournalStorage(backend)).set_user_attr(SHARED, True)
    outcome = heretic("worker", "--study-storage", path)
    told = (
        "Error: The study 'heretic' names code to run: scorers.mine.use = hostile.py:Mine. It only runs with your consent. Read it, and "
        "if you trust it, add --trust-scorers.\n"
    )
    assert (outcome.code, outcome.err) == (2, told)
    assert not marker.exists()


def test_places_in_a_journal(workplace: Path) -> None:
    write_study(residual_plot_path="/somewhere", benchmark_path="/somewhere", save_directory="/somewhere")
    with Checkpoint(Settings(model="m")) as checkpoint:
        checkpoint.study.set_user_attr("given", [*Settings.model_fields])
        settings = {**checkpoint.study.user_attrs["settings"], "study_checkpoint_dir": "/somewhere", "trust_remote_code": True}
        checkpoint.study.set_user_attr("settings", settings)
        restored = checkpoint.restored(Settings(model="m"))
    usual = Settings(model="m")
    for name in (*NEVER_STORED, *PER_RUN):
        assert getattr(restored, name) == getattr(usual, name), name


# Configurations


@pytest.mark.parametrize(
    ("line", "named", "flag"),
    [
        ('scorers.mine.use = "hostile.py:Mine"', "scorers.mine.use = hostile.py:Mine", "--trust-scorers"),
        ("trust_remote_code = true", "trust_remote_code = true", "--trust-remote-code"),
        ("trust_scorers = true", "trust_scorers = true", "--trust-scorers"),
        ('benchmark_path = "tasks"', "benchmark_path = tasks", "--benchmark-path tasks"),
    ],
)
def test_a_configuration_in_the_working_directory(line: str, named: str, flag: str, marker: Path, heretic: Heretic) -> None:
    Path("config.toml").write_text(f"{line}\n{SMALL}")
    told = (
        f"Error: config.toml names code to run: {named}. It only runs with your consent. Read it, and if you trust it, add {flag} or "
        "--config config.toml.\n"
    )
    assert heretic() == Outcome(2, "", told)
    assert heretic("compare", "m", "m") == Outcome(2, "", told)
    assert not marker.exists()
    for arguments in (flag.split(), ["--config", "config.toml"]):
        load_settings(arguments)


def test_an_env_file_in_the_working_directory(marker: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text('HERETIC_SCORERS={"mine": {"use": "hostile.py:Mine"}}\n')
    outcome = heretic("--config", "config.toml")
    assert outcome.err.startswith("Error: .env names code to run: scorers.mine.use = hostile.py:Mine. It only runs with your consent.")
    assert not marker.exists()
    monkeypatch.setenv("HERETIC_TRUST_SCORERS", "1")
    assert heretic().err.endswith("hostile.py has no Mine.\n")
    assert marker.exists()


def test_a_part_of_a_scorer_on_the_command_line_is_no_consent(marker: Path) -> None:
    Path("config.toml").write_text(f'scorers.mine.use = "hostile.py:Mine"\n{SMALL}')
    with pytest.raises(UsageError, match="names code to run"):
        load_settings(["--scorers", '{"mine": {"direction": "minimize"}}'])


@pytest.mark.parametrize("answer", [True, False])
def test_the_user_is_asked_at_a_terminal(answer: bool, marker: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = []

    def confirm(question: str) -> bool:
        questions.append(question)
        return answer

    monkeypatch.setattr("heretic.trust.can_ask", lambda: True)
    monkeypatch.setattr("heretic.trust._confirm", confirm)
    Path("config.toml").write_text(f'scorers.mine.use = "hostile.py:\x1b[2JMine"\n{SMALL}'.replace("\x1b", "\\u001b"))
    outcome = heretic()
    assert questions == ["config.toml names code to run: scorers.mine.use = hostile.py:[2JMine. Run it?"]
    assert (marker.exists(), outcome.code) == (answer, 2)


def test_files_that_were_read_are_named(workplace: Path, heretic: Heretic) -> None:
    from heretic import __version__

    Path(".env").write_text("HERETIC_SEED=3\n")
    assert heretic("--bad-prompts.dataset", "none.txt").out.splitlines()[0] == f"heretic {__version__}, settings from config.toml and .env"
    shutil.move("config.toml", "mine.toml")
    Path(".env").unlink()
    lines = heretic("--config", "mine.toml", "--bad-prompts.dataset", "none.txt").out.splitlines()
    assert lines[0] == f"heretic {__version__}, settings from mine.toml"


# The working directory


def test_modules_in_the_working_directory(workplace: Path) -> None:
    """A worker is `python -m heretic`, which would look for modules here first."""
    from heretic.console import Console
    from heretic.sharing.devices import WorkerPlace
    from heretic.sharing.workers import Worker

    for name in ("filelock", "optuna", "psutil"):
        Path(f"{name}.py").write_text(HOSTILE_MODULE.format(marker=workplace / "ran"))
    worker = Worker(1, WorkerPlace((), 1), {"settings": {"debug": False}}, Console(), lambda: False)
    worker.start()
    assert worker.process is not None
    worker.process.wait(300)
    assert worker.how_it_ended().startswith("ended: KeyError: 'devices'")
    worker.close()
    assert not (workplace / "ran").exists()


# Text on the screen

CONTROLS = "".join(map(chr, [*range(9), *range(11, 32), 127, *range(128, 160)]))
HOSTILE_TEXT = f"one\x1b]0;title\x07two\x1b[2Jthree\x9b31mfour{CONTROLS}five"
CLEAN = "one]0;titletwo[2Jthree31mfourfive"


def test_text_for_the_screen() -> None:
    assert screen_text(HOSTILE_TEXT) == CLEAN
    assert screen_text("tab\tline\näöü ✓ 漢字 🙂") == "tab\tline\näöü ✓ 漢字 🙂"


def test_responses_prompts_and_names_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    from heretic.console import Console

    console = Console()
    console.message(HOSTILE_TEXT)
    console.warning(HOSTILE_TEXT)
    console.error(HOSTILE_TEXT)
    console.heading(HOSTILE_TEXT)
    console.columns(HOSTILE_TEXT, [HOSTILE_TEXT], [[HOSTILE_TEXT]])
    with console.task(HOSTILE_TEXT):
        pass
    out, err = capsys.readouterr()
    assert not set(CONTROLS) & set(out + err)
    assert out.count(CLEAN) == 5 and err.count(CLEAN) == 1  # in the table's cells it is wrapped


def test_a_terminal_gets_only_the_codes_of_this_program() -> None:
    from rich.table import Table
    from rich.text import Text

    from heretic.console import _Screen

    def shown(text: str) -> str:
        screen = _Screen(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200, highlight=False)
        table = Table(title="t")
        table.add_row(Text(text, style="bold red"))
        screen.print(table)
        screen.print(Text(text, style="green"))
        assert isinstance(screen.file, io.StringIO)
        return screen.file.getvalue()

    codes = re.compile(r"\x1b\[[0-9;]*m|\x1b.|[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f-\x9f]")
    hostile = HOSTILE_TEXT.removesuffix(f"{CONTROLS}five")
    assert codes.findall(shown(hostile)) == codes.findall(shown("four")) != []


def test_errors_and_chat_on_the_screen(workplace: Path, heretic: Heretic, capsys: pytest.CaptureFixture[str]) -> None:
    from heretic.session.interact import _write

    outcome = heretic("no\x1b[2J/where/\x9bis")
    assert outcome.err == "Error: The folder no[2J/where/is does not exist. Check the path (a hub id has the form owner/name).\n"
    assert "\x1b" not in heretic("no\x1b[2J/where/is", "--debug").err
    for token in ("hello\x1b", "]0;title\x07", "\x9b2J", " you\n"):
        _write(token)
    assert capsys.readouterr().out == "hello]0;title2J you\n"


# Secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:SEC#RET@host/db", "postgresql://u:***@host/db"),
        ("postgresql://u:SEC/RET@host/db", "postgresql://u:***@host/db"),
        ("postgresql://u:SEC?RET@host/db", "postgresql://u:***@host/db"),
        ("postgresql://u:SEC%40RET@host/db", "postgresql://u:***@host/db"),
        ("postgresql://u:SEC@RET@host/db", "postgresql://***@host/db"),
        ("postgresql://u:@/SECRET@host/db", "postgresql://***@host/db"),
        ("mysql+pymysql://u:SEC[RET@host/db", "mysql+pymysql://u:***@host/db"),
        ("postgresql://u:SECRET@host:port/db", "postgresql://***@host:port/db"),
        ("postgresql://host/db?user=u&password=SECRET", "postgresql://host/db?user=u&password=***"),
        ("postgresql://host/db?sslmode=require&sslpassword=SEC@RET&x=1", "postgresql://host/db?sslmode=require&sslpassword=***&x=1"),
        ("grpc://u:SECRET@host", "grpc://***@host"),
        ("grpc://SEC@RET:1/@host:x", "grpc://***@host:x"),
        ("nosuch://u:SECRET@host", "nosuch://u:***@host"),
        ("postgresql://u@host/db", "postgresql://u@host/db"),
        ("grpc://host:13000", "grpc://host:13000"),
        ("studies/journal.log", "studies/journal.log"),
    ],
)
def test_passwords_of_storages(url: str, shown: str) -> None:
    from heretic.privacy import shown_location

    assert shown_location(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "grpc://u:SEC/RET@host",
        "grpc://u:SECRET@host:SECRET",
        "grpc://[SECRET",
        "postgresql://u:SEC@RET@localhost:1/db",
        "postgresql://u:SECRET@localhost:SECRET/db",
        "postgresql://u:SEC#RET@localhost:1/db",
        "nosuch://u:SEC/RET@host/db",
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_passwords_in_errors(url: str, debug: list[str], workplace: Path, heretic: Heretic) -> None:
    outcome = heretic("--study-storage", url, *debug)
    assert outcome.code in (1, 2)
    told = outcome.out + outcome.err
    assert "SEC" not in told.replace(":SECRET/db", "").replace("host:SECRET", "").replace("[SECRET", "") and "RET@" not in told, told


def test_values_in_tracebacks(workplace: Path, heretic: Heretic) -> None:
    outcome = heretic("--study-storage", "postgresql://u:SECRET@host/db", "--n-trials", "2", "--n-startup-trials", "5", "--debug")
    assert outcome.code == 2 and "Traceback" in outcome.err and "n_startup_trials (5) is larger" in outcome.err
    assert "SECRET" not in outcome.err
    Path("config.toml").unlink()
    outcome = heretic("--study-storage", "postgresql://u:SECRET@h/d", "--debug")
    assert outcome.err.endswith("Error: No model is given. Try: heretic <model-id or folder>, or heretic --demo\n")
    assert "SECRET" not in outcome.err and "RET@" not in outcome.err


def test_what_custom_scorers_are_told(workplace: Path, heretic: Heretic) -> None:
    """A key is in no file that a run leaves, and not on the screen; a study knows when it has changed all the same."""
    Path("mine.py").write_text(SCORER)
    told = ["--scorers", json.dumps({"mine": {"use": "mine.py:Mine", "settings": {"api_key": KEY}}})]
    saving = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "adapter", "--save-directory", "out"]
    outcome = heretic(*told, *saving)
    assert (outcome.code, outcome.err) == (0, "")
    assert KEY not in outcome.out
    files = [path for path in workplace.rglob("*") if path.is_file()]
    assert {"heretic.json", "m.jsonl", "m.report.html"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    record = json.loads(Path("out/heretic.json").read_text())
    assert record["settings"]["scorers"]["mine"] == {"use": "mine.py:Mine", "direction": None, "finalists_only": None, "settings": {}}

    assert heretic(*told).code == 0
    for arguments in (["--trust-scorers"], ["--scorers", json.dumps({"mine": {"use": "mine.py:Mine", "settings": {"api_key": "other"}}})]):
        outcome = heretic(*arguments)
        assert outcome.code == 1
        assert "the contents of the scorer mine have changed (or its settings, which are not stored: give them again)." in outcome.err
    outcome = heretic("--scorers", json.dumps({"mine": {"use": "mine.py:Mine", "direction": "minimize", "settings": {"api_key": KEY}}}))
    assert outcome.code == 1 and "does not match this run: scorers was" in outcome.err and KEY not in outcome.err
    for debug in ([], ["--debug"]):
        wrong = heretic("--scorers", json.dumps({"mine": {"use": "mine.py:Mine", "settings": {"api_key": [KEY]}}}), *debug)
        assert wrong.err.endswith("Error: Setting scorers.mine.settings.api_key: Input should be a valid string.\n")
        assert KEY not in wrong.err


def test_which_scorers_are_custom() -> None:
    assert [ScorerSpecification(use=use).is_custom for use in (None, "classifier", "mine.py:Mine", "package.module:Mine")] == [
        False,
        False,
        True,
        True,
    ]
    assert Settings(model="m", scorers={"judge": {"use": "classifier", "settings": {"model": "j"}}}).stored()["scorers"]["judge"][
        "settings"
    ] == {"model": "j"}
