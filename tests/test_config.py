"""Where settings come from, which source wins, and the exact line for each way to get them wrong."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from heretic import config, settings_sources
from heretic.commands import REBUILD_FLAGS
from heretic.config import Settings
from heretic.demo import PROMPTS as DEMO_PROMPTS
from heretic.errors import UsageError
from heretic.settings_sources import load_settings
from heretic.specifications import PromptSpecification

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HERETIC_N_LEARNED_TRIALS")


def told(*arguments: str) -> str:
    """The message for arguments (and sources) that are wrong."""
    with pytest.raises(UsageError) as caught:
        load_settings(arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_order_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.toml").write_text('model = "toml"\nn_trials = 100\nseed = 1\nbatch_size = 1\nmax_batch_size = 1\n')
    Path("other.toml").write_text('model = "other"\n')
    Path(".env").write_text("HERETIC_SEED=2\nHERETIC_BATCH_SIZE=2\nHERETIC_MAX_BATCH_SIZE=2\nUNRELATED=x\n")
    monkeypatch.setenv("HERETIC_BATCH_SIZE", "3")
    monkeypatch.setenv("HERETIC_MAX_BATCH_SIZE", "3")
    settings = load_settings(["--max-batch-size", "4"])
    assert (settings.model, settings.n_trials, settings.seed) == ("toml", 100, 2)
    assert (settings.batch_size, settings.max_batch_size) == (3, 4)
    # --config takes the place of config.toml; the other sources stay.
    settings = load_settings(["--config", "other.toml"])
    assert (settings.model, settings.n_trials, settings.seed) == ("other", 200, 2)


def test_model_is_the_positional_argument_or_a_flag() -> None:
    assert load_settings(["a/b"]).model == load_settings(["--model", "a/b"]).model == load_settings(["--model=a/b"]).model == "a/b"
    assert load_settings(["a", "--model", "a"]).model == "a"
    assert load_settings(["--n-trials", "5", "123"]).model == "123"


def test_parts_of_prompt_sources_come_from_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.toml").write_text('[good_prompts]\ndataset = "g"\nsplit = "s"\ncolumn = "c"\nprefix = "p"\n')
    Path(".env").write_text("HERETIC_GOOD_PROMPTS__SPLIT=from .env\nHERETIC_GOOD_PROMPTS__COLUMN=from .env\n")
    monkeypatch.setenv("HERETIC_GOOD_PROMPTS__COLUMN", "from the environment")
    settings = load_settings(["m", "--good-prompts.dataset", "x", "--bad-prompts", '{"dataset": "y"}'])
    assert settings.good_prompts == PromptSpecification(dataset="x", split="from .env", column="from the environment", prefix="p")
    assert settings.bad_prompts == PromptSpecification(dataset="y")


def test_a_part_without_a_dataset_changes_the_usual_source() -> None:
    assert load_settings(["m", "--bad-prompts.suffix", "!"]).bad_prompts == PromptSpecification(
        dataset="mlabonne/harmful_behaviors", split="train[:400]", column="text", suffix="!"
    )
    assert load_settings(["--demo", "--bad-prompts.suffix", "!"]).bad_prompts == PromptSpecification(dataset="heretic-demo:bad", suffix="!")


def test_lists_tables_and_flags_on_the_command_line() -> None:
    lists = ["--dtypes", '["float32"]', "--refusal-markers", "sorry, but no", "--refusal-markers", "no way"]
    tables = ["--max-memory", '{"0": "20GB"}', "--device-map", '{"": "cpu"}']
    flags = ["--debug", "--no-trust-remote-code", "--no-upload-repo-private"]
    settings = load_settings(["m", *lists, *tables, *flags, "--max-shard-size", "1000000"])
    assert settings.dtypes == ["float32"]
    assert settings.refusal_markers == ["sorry, but no", "no way"]
    assert settings.max_memory == {"0": "20GB"}
    assert settings.device_map == {"": "cpu"}
    assert settings.debug
    assert settings.upload_repo_private is False
    assert settings.max_shard_size == 1_000_000
    assert load_settings(["m", "--upload-repo-private"]).upload_repo_private is True


def test_number_of_trials() -> None:
    def trials(*arguments: str) -> tuple[int, int]:
        settings = load_settings(arguments)
        return settings.n_trials, settings.n_startup_trials

    assert trials("m") == (200, 60)
    assert trials("--demo") == (40, 15)
    assert trials("--demo", "--n-trials", "200") == (200, 15)
    assert trials("m", "--n-trials", "10") == (10, 3)
    assert trials("m", "--n-trials", "60") == (60, 60)
    assert trials("m", "--n-trials", "0", "--n-learned-trials", "8") == (0, 0)
    assert trials("m", "--n-trials", "10", "--n-startup-trials", "10") == (10, 10)
    assert told("m", "--n-trials", "10", "--n-startup-trials", "11") == (
        "n_startup_trials (11) is larger than n_trials (10); decrease the first or increase the second."
    )
    assert told("--demo", "--n-startup-trials", "41").startswith("n_startup_trials (41) is larger than n_trials (40)")
    # Defaults that follow from other settings are no second problem, and do not count as given.
    expected = "Setting n_trials (on the command line): Input should be greater than or equal to 0, got '-1'."
    assert told("m", "--n-trials", "-1") == expected
    assert load_settings(["--demo"]).model_fields_set == {"demo", "model", *DEMO_PROMPTS}


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "on"])
def test_demo_from_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERETIC_DEMO", value)
    settings = load_settings([])
    assert (settings.model, settings.n_trials) == ("heretic-demo", 40)
    assert settings.bad_evaluation_prompts == PromptSpecification(dataset="heretic-demo:bad_evaluation")


def test_demo_wins_over_the_model_and_prompts_of_weaker_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.toml").write_text('model = "m"\nseed = 3\n[good_prompts]\ndataset = "d"\nsplit = "train"\ncolumn = "text"\n')
    settings = load_settings(["--demo"])
    assert (settings.model, settings.seed) == ("heretic-demo", 3)
    assert settings.good_prompts == PromptSpecification(dataset="heretic-demo:good")
    monkeypatch.setenv("HERETIC_DEMO", "true")
    assert load_settings(["--no-demo"]).model == "m"
    assert told("m") == "demo uses its own model; remove the model 'm' or --demo."
    monkeypatch.setenv("HERETIC_DEMO", "perhaps")
    assert told() == ("Setting demo (in the environment): Input should be a valid boolean, unable to interpret input, got 'perhaps'.")


COMMAND_LINES = {
    (): "No model is given. Try: heretic <model-id or folder>, or heretic --demo",
    ("--no-demo",): "No model is given. Try: heretic <model-id or folder>, or heretic --demo",
    ("",): "model is empty; give a hub id or a local path.",
    ("a", "--model", "b"): "Two models are given, 'a' and --model 'b'; use one.",
    ("a", "b"): "Wrong usage: unrecognized arguments: b. heretic --help lists all options.",
    ("m", "-x"): "Wrong usage: unrecognized arguments: -x. heretic --help lists all options.",
    ("m", "--n-trials"): "Wrong usage: argument --n-trials: expected one argument. heretic --help lists all options.",
    ("m", "--config"): "Wrong usage: argument --config: expected one argument. heretic --help lists all options.",
    ("m", "--n-trails", "5"): "Unknown option --n-trails (did you mean --n-trials?). heretic --help lists all options.",
    ("m", "--n_trials=5"): "Unknown option --n_trials (did you mean --n-trials?). heretic --help lists all options.",
    ("m", "--good-prompts.datset", "x"): (
        "Unknown option --good-prompts.datset (did you mean --good-prompts.dataset?). heretic --help lists all options."
    ),
    ("m", "--n-trials", "many"): (
        "Setting n_trials (on the command line): Input should be a valid integer, unable to parse string as an integer, got 'many'."
    ),
    ("m", "--n-trials", "-1"): "Setting n_trials (on the command line): Input should be greater than or equal to 0, got '-1'.",
    ("m", "--n-learned-trials", "-1"): (
        "Setting n_learned_trials (on the command line): Input should be greater than or equal to 0, got '-1'."
    ),
    ("m", "--n-trials", "0", "--n-learned-trials", "0"): (
        "n_trials and n_learned_trials are both 0, so there would be no trials; increase one of them."
    ),
    ("m", "--seed", "-1"): "Setting seed (on the command line): Input should be greater than or equal to 0, got '-1'.",
    ("m", "--seed", "4294967296"): "Setting seed (on the command line): Input should be less than 4294967296, got '4294967296'.",
    ("m", "--kl-divergence-scale", "0"): "Setting kl_divergence_scale (on the command line): Input should be greater than 0, got '0'.",
    ("m", "--kl-divergence-target", "nan"): (
        "Setting kl_divergence_target (on the command line): Input should be a finite number, got 'nan'."
    ),
    ("m", "--winsorization-quantile", "1.5"): (
        "Setting winsorization_quantile (on the command line): Input should be less than or equal to 1, got '1.5'."
    ),
    ("m", "--row-normalization", "ful"): (
        "Setting row_normalization (on the command line): Input should be 'none', 'pre' or 'full', got 'ful'."
    ),
    ("m", "--model-action", "sav"): (
        "Setting model_action (on the command line): Input should be 'save', 'upload', 'chat', 'scores', 'benchmark' or 'none', got 'sav'."
    ),
    ("m", "--dtypes", '["float33"]'): (
        "Setting dtypes.0 (on the command line): Input should be 'auto', 'float16', 'bfloat16' or 'float32', got 'float33'."
    ),
    ("m", "--dtypes", "[]"): "Setting dtypes (on the command line): List should have at least 1 item after validation, not 0, got [].",
    ("m", "--refusal-markers", '["sorry", " "]'): (
        "Setting refusal_markers (on the command line): an empty marker would match every response, got ['sorry', ' ']."
    ),
    ("m", "--max-shard-size", "5GiB"): "Setting max_shard_size (on the command line): a size has the form 500MB or 5GB, got '5GiB'.",
    ("m", "--max-shard-size", "0"): "Setting max_shard_size (on the command line): a size is greater than 0, got '0'.",
    ("m", "--max-shard-size", "0.0GB"): "Setting max_shard_size (on the command line): a size is greater than 0, got '0.0GB'.",
    ("m", "--evaluate-model", ""): "Setting evaluate_model (on the command line): String should have at least 1 character, got ''.",
    ("m", "--workers", "0"): (
        "Setting workers (on the command line): Input should be 'auto', got '0'.\n"
        "Setting workers (on the command line): Input should be greater than 0, got '0'."
    ),
    ("m", "--good-prompts.dataset", ""): (
        "Setting good_prompts.dataset (on the command line): String should have at least 1 character, got ''."
    ),
    ("m", "--refusal-markers", '["sorry"'): (
        'Setting refusal_markers (on the command line) cannot be read: lists and tables are written as JSON, such as ["sorry", "i can\'"].'
    ),
    ("m", "--max-memory", "20GB"): (
        'Setting max_memory (on the command line) cannot be read: lists and tables are written as JSON, such as {"0": "20GB"}.'
    ),
    ("m", "--good-prompts", "prompts.txt"): (
        "Setting good_prompts (on the command line) cannot be read: lists and tables are written as JSON, "
        'such as {"dataset": "mlabonne/harmless_alpaca", "split": "train[:400]", "column": "text"}.'
    ),
    ("m", "--config", "missing.toml"): "The configuration file missing.toml cannot be read: No such file or directory. Check --config.",
    ("m", "--config", "."): "The configuration file . cannot be read: Is a directory. Check --config.",
}


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=" ".join)
def test_wrong_command_line(arguments: tuple[str, ...]) -> None:
    assert told(*arguments) == COMMAND_LINES[arguments]


ENVIRONMENTS = {
    ("N_TRAILS", "5"): "Unknown setting n_trails (in the environment) (did you mean n_trials?).",
    ("N_TRIALS__X", "5"): "Unknown setting n_trials__x (in the environment) (did you mean n_trials?).",
    ("GOOD_PROMPTS__DATSET", "x"): "Unknown setting good_prompts.datset (in the environment) (did you mean dataset?).",
    ("N_TRIALS", ""): (
        "Setting n_trials (in the environment): Input should be a valid integer, unable to parse string as an integer, got ''."
    ),
    ("DTYPES", "float32"): (
        'Setting dtypes (in the environment) cannot be read: lists and tables are written as JSON, such as ["auto", "float16"].'
    ),
}


@pytest.mark.parametrize(("name", "value"), ENVIRONMENTS)
@pytest.mark.parametrize("where", ["in the environment", "in .env"])
def test_wrong_environment(where: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "in .env":
        Path(".env").write_text(f"HERETIC_{name}={value}\n")
    else:
        monkeypatch.setenv(f"HERETIC_{name}", value)
    assert told("m") == ENVIRONMENTS[name, value].replace("in the environment", where)


FILES = {
    b"n_trails = 5": "Unknown setting n_trails (in config.toml) (did you mean n_trials?).",
    b'[bad_prompts]\ndatset = "x"': "Unknown setting bad_prompts.datset (in config.toml) (did you mean dataset?).",
    b"model = 5": "Setting model (in config.toml): Input should be a valid string, got 5.",
    b"n_trials = 1.5": (
        "Setting n_trials (in config.toml): Input should be a valid integer, got a number with a fractional part, got 1.5."
    ),
    b"device_map = 5": (
        "Setting device_map (in config.toml): Input should be a valid string, got 5.\n"
        "Setting device_map (in config.toml): Input should be a valid dictionary, got 5."
    ),
    b'good_prompts = "x.txt"': (
        "Setting good_prompts (in config.toml): Input should be a valid dictionary or instance of PromptSpecification, got 'x.txt'."
    ),
    b"seed = 1\nn_trials = \n": "The configuration file config.toml is not valid TOML: Invalid value (at line 2, column 12).",
    b"seed = 1\nseed = 2\n": "The configuration file config.toml is not valid TOML: Cannot overwrite a value (at line 2, column 9).",
    b'seed = 1\nsystem_prompt = "\xff"\n': "The configuration file config.toml is not UTF-8 text (line 2).",
}


@pytest.mark.parametrize("content", FILES)
def test_wrong_file(content: bytes) -> None:
    Path("config.toml").write_bytes(content)
    assert told(*([] if b"model" in content else ["m"])) == FILES[content]


def test_env_file_that_is_not_text() -> None:
    Path(".env").write_bytes(b"HERETIC_SYSTEM_PROMPT=\xff\n")
    assert told("m") == "Settings in .env cannot be read: it is not UTF-8 text."


def test_the_source_named_is_the_one_with_the_fault() -> None:
    Path("config.toml").write_text('[good_prompts]\ndatset = "x"\n')
    assert told("m", "--good-prompts.dataset", "y") == "Unknown setting good_prompts.datset (in config.toml) (did you mean dataset?)."


def test_every_fault_is_told_at_once() -> None:
    assert told("m", "--n-trials", "-1", "--seed", "x").count("\n") == 1


def test_settings_are_frozen_and_checked_for_library_users() -> None:
    settings = Settings(model="m")
    with pytest.raises(ValueError, match="frozen"):
        settings.n_trials = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="n_trails"):
        Settings(model="m", n_trails=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="larger than"):
        Settings(model="m", n_trials=5, n_startup_trials=6)


def test_a_library_user_is_not_disturbed_by_files_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.toml").write_text("n_trials = 5\n")
    monkeypatch.setenv("HERETIC_SEED", "5")
    assert (Settings(model="m").n_trials, Settings(model="m").seed) == (200, None)


# Every setting that the documentation of the program's earlier releases names, at its default there.
ORIGINAL = """
dtypes = ["auto", "float16", "float32"]
device_map = "auto"
batch_size = 0
max_batch_size = 128
max_response_length = 100
kl_divergence_scale = 1.0
kl_divergence_target = 0.01
orthogonalize_direction = false
row_normalization = "none"
full_normalization_lora_rank = 3
winsorization_quantile = 1.0
quantization = "none"
n_trials = 200
n_startup_trials = 60
study_checkpoint_dir = "checkpoints"
print_responses = false
print_residual_geometry = false
plot_residuals = false
residual_plot_path = "plots"
residual_plot_title = "Residual vectors"
residual_plot_style = "dark_background"
refusal_markers = ["sorry", "i can't", "i cannot"]
system_prompt = "You are a helpful assistant."

[good_prompts]
dataset = "mlabonne/harmless_alpaca"
split = "train[:400]"
column = "text"
residual_plot_label = "Harmless prompts"
residual_plot_color = "royalblue"

[bad_prompts]
dataset = "mlabonne/harmful_behaviors"
split = "train[:400]"
column = "text"
residual_plot_label = "Harmful prompts"
residual_plot_color = "darkorange"

[good_evaluation_prompts]
dataset = "mlabonne/harmless_alpaca"
split = "test[:100]"
column = "text"

[bad_evaluation_prompts]
dataset = "mlabonne/harmful_behaviors"
split = "test[:100]"
column = "text"
"""


def test_a_file_of_the_original_program_works_unchanged() -> None:
    Path("config.toml").write_text(ORIGINAL)
    settings = load_settings(["m"])
    changed: dict[str, Any] = {
        "dtypes": ["auto", "float16", "float32"],
        "refusal_markers": ["sorry", "i can't", "i cannot"],
        "residual_plot_title": "Residual vectors",
        "residual_plot_style": "dark_background",
        "good_prompts": {"residual_plot_label": "Harmless prompts", "residual_plot_color": "royalblue"},
        "bad_prompts": {"residual_plot_label": "Harmful prompts", "residual_plot_color": "darkorange"},
    }
    assert settings.model_dump() == Settings(model="m", **changed).model_dump()


def written(name: str) -> Any:
    """What `tools/write_defaults.py` makes of a file."""
    import importlib.util

    specification = importlib.util.spec_from_file_location("write_defaults", ROOT / "tools/write_defaults.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.FILES[ROOT / name]()


@pytest.mark.parametrize("name", ["config.default.toml", "src/heretic/help.txt"])
def test_files_that_repeat_the_settings_are_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == written(name), "run tools/write_defaults.py"


def test_default_file_lists_every_setting_with_its_default() -> None:
    text = (ROOT / "config.default.toml").read_text(encoding="utf-8")
    listed = re.findall(r"^(?:# )?(\w+) =", text.split("\n[")[0], re.MULTILINE) + re.findall(r"^\[(\w+)\]", text, re.MULTILINE)
    assert sorted(listed) == sorted(Settings.model_fields)
    values = tomllib.loads(text)
    Path("config.toml").write_text(text, encoding="utf-8")
    assert load_settings(["m"]).model_dump() == Settings(model="m").model_dump()
    assert all(values[name] == config.default_value(name) for name in values if name != "chain_of_thought_skips")


def test_help_names_every_option_and_only_those() -> None:
    text = (ROOT / "src/heretic/help.txt").read_text(encoding="utf-8")
    named = set(re.findall(r"^ +(?:-h, )?(--[\w-]+)", text, re.MULTILINE)) - {"--help", "--version"}
    assert named >= set(REBUILD_FLAGS)
    named -= set(REBUILD_FLAGS)
    parser, _ = settings_sources.command_parser()
    options = {option for option in parser._option_string_actions if "." not in option and not option.startswith("--no-")}
    assert named == options
