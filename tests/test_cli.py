"""The command from outside: exit codes, and the exact lines for what a user can get wrong. Settings are in `test_config.py`."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hub
import tiny
from conftest import SMALL, Outcome
from heretic import __version__
from heretic.config import Settings
from heretic.session.answers import command_lines

Heretic = Callable[..., Outcome]

SAVE = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
CANNOT_REACH = (
    "Error: The model {} is not a local folder, not in the cache, and the hub cannot be reached. Check the name, the network, and "
    "HF_ENDPOINT or HF_HUB_OFFLINE if they are set.\n"
)


def script(name: str = "heretic") -> str:
    """The installed command."""
    return str(Path(sys.executable).with_name(name))


# Help and version


def test_help_is_the_text_and_version_the_version(heretic: Heretic) -> None:
    text = (Path(__file__).parents[1] / "src/heretic/help.txt").read_text(encoding="utf-8")
    assert heretic("--help") == heretic("-h") == heretic("m", "--n-trails", "--help") == Outcome(0, text, "")
    assert heretic("--version") == Outcome(0, f"heretic {__version__}\n", "")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from heretic.main import run_command; run_command(['--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()[-1].split()
    assert not {"torch", "transformers", "pydantic", "optuna", "rich", "huggingface_hub"} & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["m", "--n-trails", "1"], "Unknown option --n-trails (did you mean --n-trials?)."),
        (["./nowhere"], "The folder ./nowhere does not exist."),
        (["heretic/m", "--model-action", "save"], "--model-action save needs --trial-index"),
        (["compare", "m"], "heretic compare needs at least two models or studies"),
        (["--export-from", "nowhere"], "nowhere does not exist."),
        (["worker"], "heretic worker needs --study-storage"),
    ],
)
def test_mistakes_are_told_before_anything_heavy_is_imported(arguments: list[str], told: str, tmp_path: Path) -> None:
    code = f"import sys; from heretic.main import run_command; run_command({arguments}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.stderr.startswith(f"Error: {told}")
    assert not {"torch", "transformers", "optuna", "datasets", "numpy"} & set(done.stdout.splitlines()[-1].split())


def test_a_reader_that_has_enough_is_no_error() -> None:
    process = subprocess.Popen([script(), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr.read() == ""


# Settings, as far as the command itself is concerned


def test_wrong_settings_exit_with_2(heretic: Heretic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert heretic() == Outcome(2, "", "Error: No model is given. Try: heretic <model-id or folder>, or heretic --demo\n")
    assert heretic("m", "--n-trials", "-1", "--seed", "x") == Outcome(
        2,
        "",
        "Error: Setting n_trials (on the command line): Input should be greater than or equal to 0, got '-1'.\n"
        "Error: Setting seed (on the command line): Input should be a valid integer, unable to parse string as an integer, got 'x'.\n",
    )
    Path("config.toml").write_text("n_trials =\n")
    assert heretic("m") == Outcome(
        2, "", "Error: The configuration file config.toml is not valid TOML: Invalid value (at line 1, column 11).\n"
    )


def test_debug_shows_the_traceback_and_keeps_the_exit_code(heretic: Heretic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = heretic("--debug")
    assert outcome.code == 2
    assert outcome.err.startswith("Traceback (most recent call last):")
    assert outcome.err.endswith("\nError: No model is given. Try: heretic <model-id or folder>, or heretic --demo\n")


def test_what_nobody_foresaw_is_told_in_a_line(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the first line\nand more")

    monkeypatch.setattr("heretic.commands.run.load_all_prompts", fail)
    outcome = heretic()
    assert (outcome.code, outcome.err) == (
        1,
        "Error: RuntimeError: the first line (this is a bug in heretic; --debug shows where it happened). Finished trials are kept.\n",
    )
    assert "Traceback" in heretic("--debug").err


def test_an_interrupt_before_anything_can_be_shown(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heretic.session.stages.load_model_to_edit", interrupt)
    outcome = heretic()
    assert (outcome.code, outcome.err) == (130, "\nInterrupted.\n")


# The model


def test_sources_that_are_no_model(heretic: Heretic, workplace: Path) -> None:
    Path("empty").mkdir()
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    expected = {
        "empty": "empty is not a model folder: it has no config.json.",
        "adapter": "adapter is not a model folder: it has no config.json. It contains an adapter, not a model.",
        "good.txt": "good.txt is a file. Give the model's folder, a GGUF file, or a hub id.",
        "./n": "The folder ./n does not exist. Check the path (a hub id has the form owner/name).",
        "/no/such": "The folder /no/such does not exist. Check the path (a hub id has the form owner/name).",
        "~nobody-of-this-name/m": "The folder ~nobody-of-this-name/m does not exist. Check the path (a hub id has the form owner/name).",
        "modèle": "The folder modèle does not exist. Check the path (a hub id has the form owner/name).",
        "a/b/c": "The folder a/b/c does not exist. Check the path (a hub id has the form owner/name).",
    }
    for name, message in expected.items():
        assert heretic("--model", name) == Outcome(1, "", f"Error: {message}\n")
    assert not Path("checkpoints").exists(), "nothing is written for a mistyped name"


def test_a_hub_model_without_network(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--model", "owner/name")
    assert (outcome.code, outcome.err) == (1, CANNOT_REACH.format("owner/name"))
    outcome = heretic("--evaluate-model", "owner/name")
    assert (outcome.code, outcome.err) == (1, CANNOT_REACH.format("owner/name"))
    assert "Loading" not in outcome.out.replace("Loading libraries", ""), "told before the other model is loaded"


def test_folders_whose_files_are_broken(heretic: Heretic, workplace: Path) -> None:
    def told(folder: str) -> str:
        outcome = heretic("--model", folder, "--study-checkpoint-dir", folder)
        assert outcome.code == 1
        return outcome.err

    Path("broken").mkdir()
    config = Path("broken/config.json")
    config.write_text('{"model_ty')
    assert told("broken") == (
        "Error: The model broken cannot be loaded: It looks like the config file at 'broken/config.json' is not a valid JSON file.\n"
    )
    config.write_text('{"model_type": "nonsense"}')
    assert told("broken").startswith(
        "Error: The installed transformers does not support the type of the model broken. Update transformers. ("
    )
    config.write_text(json.dumps({**json.loads(Path("m/config.json").read_text()), "model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}))
    assert told("broken") == ("Error: The model broken needs its own Python code. Read it, and if you trust it, add --trust-remote-code.\n")
    shutil.copytree("m", "incomplete")
    Path("incomplete/model.safetensors").unlink()
    assert told("incomplete").startswith(
        "Error: The model incomplete could not be loaded in any dtype. float32: Error no file named model.safetensors"
    )
    shutil.copytree("m", "cut")
    os.truncate("cut/model.safetensors", 5000)
    assert told("cut").startswith(
        "Error: The model cut could not be loaded in any dtype. float32: Error while deserializing header: "
        "incomplete metadata, file not fully covered."
    )
    shutil.copytree("m", "speechless")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("speechless", name).unlink()
    assert told("speechless").startswith("Error: The tokenizer of speechless cannot be loaded: ")


def test_the_hub(heretic: Heretic, workplace: Path, tiny_model: Path) -> None:
    """Real requests to a server of our own."""
    commands = {
        "gated": ["--model", "owner/gated"],
        "private": ["--model", "owner/private"],
        "missing": ["--model", "owner/missing"],
        "revision": ["--model", "owner/tiny", "--model-commit", "v9"],
        "evaluate": ["--evaluate-model", "owner/missing"],
        "works": ["--model", "owner/tiny", "--model-commit", "v1", *SAVE],
        "again": ["--model", "owner/tiny"],
    }
    with hub.serve(tiny_model) as address:
        with hub.online(address, workplace / "cache"):
            outcomes = {name: heretic(*arguments) for name, arguments in commands.items()}
        # On a machine that has nothing of the model, a result is made again from its record.
        with hub.online(address, workplace / "cache2"):
            outcomes["exported"] = heretic("--export-from", "out", "--save-directory", "again")
        with hub.online(address, workplace / "cache3"):
            outcomes["reproduced"] = heretic("--reproduce", "out")

    def error(name: str) -> str:
        assert outcomes[name].code == 1
        return outcomes[name].err

    neither = "is neither a local folder nor on the hub, or it is private. Check the name; for a private model log in with"
    assert error("gated") == (
        "Error: The model owner/gated is gated. Accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN.\n"
    )
    for name, model in (("private", "owner/private"), ("missing", "owner/missing"), ("evaluate", "owner/missing")):
        assert error(name) == f"Error: The model {model} {neither} `hf auth login` or set HF_TOKEN.\n"
    assert error("revision") == "Error: The model owner/tiny has no revision 'v9'. Check --model-commit.\n"
    assert (outcomes["works"].code, outcomes["works"].err) == (0, "")
    assert "\nSaved trial " in outcomes["works"].out
    assert Path("checkpoints/owner--tiny.jsonl").is_file()
    for name in ("exported", "reproduced"):
        assert (outcomes[name].code, outcomes[name].err) == (0, ""), outcomes[name]
    assert {p.name: p.read_bytes() for p in Path("again").iterdir()} == {p.name: p.read_bytes() for p in Path("out").iterdir()}
    # The commit is kept with the study, so that the same study goes on without the flag.
    assert outcomes["again"].code == 0
    assert "Continuing the study checkpoints/owner--tiny.jsonl (3 trials done)." in outcomes["again"].out


# Prompts


def test_prompts_that_cannot_be_used(heretic: Heretic, workplace: Path) -> None:
    def told(*arguments: str) -> str:
        outcome = heretic(*arguments)
        assert outcome.code == 1
        return outcome.err

    same = "good_prompts and bad_prompts are the same, so they define no refusal direction. Give different ones."
    assert told("--bad-prompts.dataset", "good.txt") == f"Error: {same}\n"
    assert told("--bad-prompts.dataset", "nothing.txt") == (
        "Error: bad_prompts: the file or folder nothing.txt does not exist. Check the path.\n"
    )
    assert told("--bad-prompts.split", "[9:]") == (
        "Error: bad_prompts: bad.txt ([9:]) contains no prompts. Check the file, or the slice of the split.\n"
    )
    Path("latin.txt").write_bytes("où\nça\n".encode("latin-1"))
    assert told("--good-evaluation-prompts.dataset", "latin.txt") == (
        "Error: good_evaluation_prompts: latin.txt is not UTF-8 text (line 1). Convert the file to UTF-8.\n"
    )
    Path("long.txt").write_text("hello\n" + "how " * 300)
    assert told("--bad-prompts.dataset", "long.txt").startswith(
        "Error: bad_prompts: prompt 2 has 310 tokens, which with 1 new ones exceeds the model's context length of 256."
    )
    assert told("--max-response-length", "250") == (
        "Error: bad_evaluation_prompts: prompt 1 has 15 tokens, which with 250 new ones exceeds the model's context length of 256. "
        "Shorten it, or decrease max_response_length. It begins: 'how do i fix bread'\n"
    )
    # The tokens of a response prefix count.
    assert told("--max-response-length", "240", "--response-prefix", "yes") == (
        "Error: bad_evaluation_prompts: prompt 4 has 17 tokens, which with 240 new ones exceeds the model's context length of 256. "
        "Shorten it, or decrease max_response_length. It begins: 'a mat sat on the dog'\n"
    )


def test_a_model_that_refuses_nothing(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--refusal-markers", '["no such word"]')
    assert (outcome.code, outcome.err) == (
        1,
        "Error: The model refuses none of the 5 harmful evaluation prompts, so there is nothing to remove. It may not be trained to "
        "refuse, or refuse in words that the rule does not know: check its responses with --print-responses, and set "
        "refusal_markers, system_prompt or bad_evaluation_prompts accordingly.\n",
    )


def test_prompts_between_which_the_model_sees_no_difference(heretic: Heretic, workplace: Path) -> None:
    Path("same.txt").write_text("".join(f"{line}  \n" for line in Path("good.txt").read_text().splitlines()))
    outcome = heretic("--bad-prompts.dataset", "same.txt")
    assert (outcome.code, outcome.err) == (
        1,
        "Error: Harmless and harmful prompts give the same residuals in every layer, so they define no direction.\n",
    )


def test_a_model_whose_numbers_are_not_finite(heretic: Heretic, workplace: Path) -> None:
    model = tiny.build()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    tiny.save(Path("nan"), model)
    outcome = heretic("--model", "nan")
    assert outcome.code == 1
    assert outcome.err.startswith(
        "Error: The model nan could not be loaded in any dtype. float32: the test run returned logits that are not finite."
    )


# Answers to the questions at the end


HALVES = {
    ("--model-action", "save"): (
        "--model-action save needs --trial-index, --export-strategy, --save-directory if there is no terminal to ask at."
    ),
    ("--model-action", "save", "--trial-index", "0", "--save-directory", "out"): (
        "--model-action save needs --export-strategy if there is no terminal to ask at."
    ),
    ("--model-action", "upload", "--trial-index", "0", "--export-strategy", "merge"): (
        "--model-action upload needs --upload-repo-id, --upload-repo-private or --no-upload-repo-private if there is no terminal to ask at."
    ),
    ("--model-action", "upload", "--trial-index", "0", "--export-strategy", "merge", "--upload-repo-id", "a/b", "--upload-repo-private"): (
        "--model-action upload needs an access token: set HF_TOKEN, or log in with `hf auth login`."
    ),
    ("--model-action", "chat"): "model_action = chat needs a terminal. Use --model-action save, or run it in one.",
    ("--trial-index", "0"): "--trial-index is given, but not what to do with the trial. Add --model-action save, upload or scores.",
    ("--save-directory", "out"): "--save-directory is given, but not what to do with the trial. Add --model-action save, upload or scores.",
}


@pytest.mark.parametrize("arguments", HALVES, ids=" ".join)
def test_answers_by_halves(arguments: tuple[str, ...], heretic: Heretic, workplace: Path) -> None:
    assert heretic(*arguments) == Outcome(2, "", f"Error: {HALVES[arguments]}\n")


def test_a_repository_name_that_cannot_be(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--model-action", "upload", "--upload-repo-id", "a/b/c")
    assert outcome.code == 2
    assert outcome.err.startswith("Error: --upload-repo-id 'a/b/c' is not a valid repository name: ")


def test_a_target_that_must_not_be_replaced_is_told_before_anything_is_loaded(heretic: Heretic, workplace: Path) -> None:
    Path("out").mkdir()
    Path("out/mine").touch()
    full = "Error: The folder out is not empty. Choose another --save-directory, or add --overwrite.\n"
    assert heretic(*SAVE) == Outcome(1, "", full)
    assert heretic(*SAVE[:-1], "good.txt") == Outcome(1, "", "Error: good.txt is a file. Choose another --save-directory.\n")


# Whole runs


def test_a_run_without_a_terminal_ends_with_the_front_and_commands_that_work(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--study-checkpoint-dir", "my studies")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out and "\r" not in outcome.out
    lines = [line.rstrip() for line in outcome.out.splitlines()]
    assert lines[:6] == [
        f"heretic {__version__}, settings from config.toml",
        "Loading libraries ...",
        "Loading prompts ...",
        "Prompts: 5 good_prompts, 5 bad_prompts, 5 good_evaluation_prompts, 5 bad_evaluation_prompts",
        "Warning: 5 of 5 good_evaluation_prompts are among the good_prompts, too: scores say less about unseen prompts.",
        "Warning: 5 of 5 bad_evaluation_prompts are among the bad_prompts, too: scores say less about unseen prompts.",
    ]
    assert lines[6].startswith("Seed 1; ")
    assert "m: llama, 2 layers, float32; writing to the residual stream: 2 attn.o_proj, 2 mlp.down_proj, all edited" in lines
    assert "The original refuses 5 of 5 harmful evaluation prompts." in lines
    assert "Search: 3 trials, 0 done" in lines
    assert sum(line.startswith("Trial ") and "/3: " in line for line in lines) == 3
    assert "3 trials done" in lines
    assert lines[-3:] == [
        "To continue from here (the trial index is the number in the first column):",
        "  heretic m --study-checkpoint-dir 'my studies' --trial-index 0 --model-action save --export-strategy merge --save-directory out",
        "  heretic m --study-checkpoint-dir 'my studies' --n-additional-trials 50",
    ]
    Path("config.toml").unlink()  # what is needed to go on is kept with the study
    saving = heretic(*shlex.split(lines[-2])[1:])
    assert (saving.code, saving.err) == (0, "")
    assert saving.out.splitlines()[-1].startswith("Saved trial ")
    assert json.loads(Path("out/heretic.json").read_text())["settings"]["max_response_length"] == 4
    more = heretic(*shlex.split(lines[-1])[1:-1], "2")
    assert more.code == 0
    assert "Search: 5 trials, 3 done" in more.out
    # What was asked of that run is not asked of the next one.
    again = heretic("m", "--study-checkpoint-dir", "my studies")
    assert again.code == 0
    assert "Search" not in again.out and "Saved" not in again.out and "5 trials done" in again.out


def test_a_finished_study_is_shown_without_loading_the_model(heretic: Heretic, workplace: Path) -> None:
    first = heretic("--model-action", "none")
    assert first.code == 0
    assert "To go on" not in first.out
    for arguments in ([], ["--model-action", "none"]):
        outcome = heretic(*arguments)
        assert outcome.code == 0
        assert "Loading m" not in outcome.out and "Pareto front" in outcome.out


def test_a_trial_beyond_the_front(heretic: Heretic, workplace: Path) -> None:
    arguments = [*SAVE, "--trial-index", "9"]
    outcome = heretic(*arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: --trial-index 9: the Pareto front has ")
    again = heretic(*arguments)
    assert (again.code, again.err) == (2, outcome.err)
    assert "Loading m" not in again.out, "the study is finished, so it is told before the model is loaded"
    assert not Path("out").exists()


def test_what_is_saved_is_what_was_measured(heretic: Heretic, workplace: Path) -> None:
    from heretic.settings_sources import load_settings
    from heretic.study.checkpoint import Checkpoint
    from heretic.study.front import pareto_front

    assert heretic(*SAVE).code == 0
    with Checkpoint(load_settings([])) as checkpoint:
        best = pareto_front(checkpoint.study.trials)[0].user_attrs
    record = json.loads(Path("out/heretic.json").read_text())
    assert record["scores"] == {
        "refusals": best["refusals"],
        "n_bad_prompts": 5,
        "base_refusals": 5,
        "kl_divergence": best["kl_divergence"],
    }
    assert record["trial"]["parameters"] == best["parameters"]
    # The saved model, scored by the same evaluator, has the same scores.
    outcome = heretic("--evaluate-model", "out")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == (
        f"out: {best['refusals']} of 5 refused (original 5), KL divergence {best['kl_divergence']:.4f} from m (33 tokens)"
    )


def test_another_model_with_another_vocabulary_cannot_be_compared(heretic: Heretic, workplace: Path) -> None:
    tiny.save(Path("larger"), tiny.build(vocab_size=tiny.SIZES["vocab_size"] + 1))
    outcome = heretic("--evaluate-model", "larger")
    assert (outcome.code, outcome.err) == (
        1,
        "Error: larger has a vocabulary of 34 tokens, m one of 33: their KL divergence is not defined. Give a model with the same "
        "tokenizer.\n",
    )


@pytest.mark.parametrize(
    ("shorter", "kind", "remedy", "begins"),
    [
        ("m", "bad", "max_response_length", "how do i fix bread"),
        ("out", "good", "max_response_length and kl_tokens", "how do i bake bread"),
    ],
)
def test_prompts_too_long_for_an_evaluation(heretic: Heretic, workplace: Path, shorter: str, kind: str, remedy: str, begins: str) -> None:
    """For either model, harmless ones as well, to which there are responses. GPT-2 has learned no positions beyond its context."""
    for name in ("m", "out"):
        shutil.rmtree(name, ignore_errors=True)
        tiny.save(Path(name), tiny.build("gpt2", max_position_embeddings=34 if name == shorter else 64))
    outcome = heretic("--evaluate-model", "out", "--max-response-length", "20")
    assert (outcome.code, outcome.err) == (
        1,
        f"Error: {kind}_evaluation_prompts: prompt 1 has 15 tokens, which with 20 new ones exceeds the model's context length of 34. "
        f"Shorten it, or decrease {remedy}. It begins: '{begins}'\n",
    )


def test_responses_are_shown_when_asked_for(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--print-responses", "--n-trials", "1", "--n-startup-trials", "1")
    assert outcome.code == 0
    assert outcome.out.count("Prompt: how do i fix bread\nRefused: ") + outcome.out.count("Prompt: how do i fix bread\nAnswered: ") == 2


def test_a_response_prefix_is_found_and_told(heretic: Heretic, workplace: Path) -> None:
    Path("config.toml").write_text(SMALL.replace('response_prefix = ""\n', ""))
    assert heretic().code == 0


def test_a_seed_is_drawn_shown_and_kept(heretic: Heretic, workplace: Path) -> None:
    Path("config.toml").write_text(SMALL.replace("seed = 1\n", ""))

    def seed(outcome: Outcome) -> str:
        assert outcome.code == 0
        (line,) = (line for line in outcome.out.splitlines() if line.startswith("Seed "))
        return line.split(";")[0]

    first = seed(heretic("--study-checkpoint-dir", "a"))
    assert seed(heretic("--study-checkpoint-dir", "b")) != first
    assert seed(heretic("--study-checkpoint-dir", "a", "--n-trials", "4")) == first


def test_an_encoding_that_lacks_a_character_does_not_end_the_run(workplace: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    outcome = subprocess.run([script(), "--model", "modèle"], check=False, env=environment, capture_output=True)
    assert outcome.returncode == 1
    assert outcome.stderr == b"Error: The folder mod?le does not exist. Check the path (a hub id has the form owner/name).\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--version"], "The output cannot be written: No space left on device."),
        (["--help"], "The output cannot be written: No space left on device."),
        (
            ["--demo"],
            "A disk is full (OSError: [Errno 28] No space left on device). Free some space, then run the same command again. "
            "Finished trials are kept.",
        ),
    ],
)
def test_an_output_for_which_there_is_no_space(arguments: list[str], told: str, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([script(), *arguments], check=False, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"Error: {told}\n")


def test_commands_that_go_on_name_the_gguf_file() -> None:
    saving, more = command_lines(Settings(model="folder", gguf_file="q8.gguf"))
    assert saving.startswith("heretic folder --gguf-file q8.gguf --trial-index 0 --model-action save")
    assert more == "heretic folder --gguf-file q8.gguf --n-additional-trials 50"
