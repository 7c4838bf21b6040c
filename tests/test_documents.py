"""What the documents promise exists: options, settings, files, commands, and the headings that links lead to. Their Python is run."""

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest

from conftest import Outcome
from heretic.commands import REBUILD_FLAGS, compare, start
from heretic.config import Settings
from heretic.main import run_command
from heretic.session.answers import check_answers
from heretic.settings_sources import command_parser, load_settings
from heretic.sharing import worker
from heretic.specifications import PromptSpecification

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("bench/*.md"), *PAGES])
LONGEST_README = 220

# Options of other programs, those in bench/ included, that the documents mention.
FOREIGN_OPTIONS = {
    "--help",
    "--version",
    "--check",
    "--no-project",
    "--extra",
    "--all-extras",
    "--nproc-per-node",
    "--model",
    "--savings",
    "--trials",
    "--outfile",
    "--outtype",
    "--strict",
    "--group",
}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tracked() -> list[Path]:
    """Every file in git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_documents_are_there() -> None:
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {path.name for path in DOCUMENTS}
    assert len(text_of(ROOT / "README.md").splitlines()) <= LONGEST_README


def test_every_page_is_in_the_site_and_found_from_the_readme() -> None:
    names = {path.name for path in PAGES}
    assert names == set(re.findall(r": ([\w-]+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE))
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", text_of(ROOT / "README.md")))
    assert names - linked == {"index.md"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_lists_are_lists_in_the_site_too(path: Path) -> None:
    """GitHub begins a list after any line; the site's Markdown only after an empty one."""
    lines = re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL).splitlines()
    for before, line in pairwise(lines):
        if re.match(r"([-*]|\d+\.) ", line):
            assert not before.strip() or re.match(r"([-*]|\d+\.) |  ", before), line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_exist(path: Path) -> None:
    parser, _ = command_parser()
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z_]+)?", text_of(path).replace("--no-...", "")))
    benches = "".join(script.read_text(encoding="utf-8") for script in ROOT.glob("bench/*.py"))
    of_benches = re.findall(r'add_argument\("(--[a-z][\w-]*)"', benches)
    assert named <= {*parser._option_string_actions, *REBUILD_FLAGS, *FOREIGN_OPTIONS, *of_benches}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_settings_exist(path: Path) -> None:
    text = text_of(path)
    for name in re.findall(r"HERETIC_([A-Z_]+)", text):
        setting, _, part = name.lower().partition("__")
        assert setting in Settings.model_fields
        assert not part or part in PromptSpecification.model_fields
    for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
        Settings.model_validate({"model": "m", **tomllib.loads(block)})
    for table in re.findall(r"^\| setting \|.*\n(?:\|.*\n)+", text, re.MULTILINE):
        cells = [row.split("|")[1] for row in table.splitlines()[2:]]
        assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} <= set(Settings.model_fields)


@pytest.mark.parametrize("name", ["config.default.toml", "config.noslop.toml"])
def test_configuration_files_are_accepted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(["m", "--config", str(ROOT / name)])
    assert settings.model == "m"


def test_the_second_use_is_complete() -> None:
    values = tomllib.loads(text_of(ROOT / "config.noslop.toml"))
    settings = Settings.model_validate({"model": "m", **values})
    assert settings.max_response_length == 300
    good, bad = settings.good_prompts, settings.bad_prompts
    for specification in (good, bad):
        assert (specification.dataset, specification.split, specification.column) == ("llm-aes/writing-prompts", "train[:500]", "prompt")
    assert good.prefix != bad.prefix
    for specification in (settings.good_evaluation_prompts, settings.bad_evaluation_prompts):
        assert specification.split == "train[1000:1100]"
    assert "writer" in settings.system_prompt
    markers = [marker.lower() for marker in settings.refusal_markers]
    assert len(set(markers)) == len(markers) >= 100


class Reached(BaseException):
    """A command line was understood, and what it asks for would begin."""


def commands(path: Path) -> Iterator[str]:
    """The command lines of a document's shell examples, without what other programs get of them."""
    for block in re.findall(r"```sh\n(.*?)```", text_of(path), re.DOTALL):
        for line in block.splitlines():
            yield from (part.strip() for part in re.split(r"&&|\|", line.partition("  #")[0].partition(">")[0]))


HERETIC = [
    pytest.param(command, id=f"{path.name}: {command}")
    for path in DOCUMENTS
    for command in commands(path)
    if re.match(r"((\w+=\S+|uv run|--extra \w+) )*heretic ", command)
]


def test_there_are_commands() -> None:
    assert len(HERETIC) >= 20


@pytest.mark.parametrize("command", HERETIC)
def test_commands_are_understood(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes as far as the work itself, and gives all the answers that nobody would be asked for."""
    Path("config.toml").unlink()
    shutil.copy(ROOT / "config.noslop.toml", ".")
    Path("log.jsonl").write_text('{"prompt": "Hello", "response": "Hello."}\n', encoding="utf-8")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)

    def reached(*arguments: Any, **_: Any) -> NoReturn:
        if arguments and isinstance(arguments[0], Settings):
            check_answers(arguments[0], False)
        raise Reached

    for module, name in ((start, "run"), (compare, "compare"), (start, "open_record"), (worker, "_existing_study")):
        monkeypatch.setattr(module, name, reached)
    arguments = shlex.split(command.partition("heretic ")[2])
    if arguments[0] == "classify":
        assert run_command(arguments) == 0
        return
    with pytest.raises(Reached):
        run_command(arguments)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_in_commands_exist(path: Path) -> None:
    for command in commands(path):
        for name in re.findall(r"(?:^|\s)((?:tools|bench|tests|\.ci)/[\w./-]+)", command):
            assert (ROOT / name).exists(), name


def examples(name: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / name), re.DOTALL)


def test_the_examples_for_library_users_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = examples("library.md")
    exec(compile(example, "library.md", "exec"), {})
    scores, answers = capsys.readouterr().out.splitlines()
    assert re.match(r"100 Score\(refusals=\d+, kl_divergence=0\.0\d+, bounded=False\)", scores)
    assert answers.startswith("['")
    (shown,) = re.findall(r"prints.*?```text\n(.*?)```", text_of(ROOT / "docs/library.md"), re.DOTALL)
    assert re.sub(r"\d+", "0", shown.splitlines()[0]) == re.sub(r"\d+", "0", scores)


def test_the_scorer_of_ones_own_works(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    (example,) = examples("scores.md")
    Path("shouting.py").write_text(example, encoding="utf-8")
    (table,) = [block for block in re.findall(r"```toml\n(.*?)```", text_of(ROOT / "docs/scores.md"), re.DOTALL) if "shouting.py" in block]
    scorer = tomllib.loads(table)["scorers"]["shouting"]
    with Path("config.toml").open("a", encoding="utf-8") as file:
        file.write(f"[scorers.shouting]\nuse = {scorer['use']!r}\ndirection = {scorer['direction']!r}\nsettings = {{ marks = 'a' }}\n")
    outcome = heretic("--config", "config.toml")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"┃ *shouting *┃", outcome.out, re.IGNORECASE)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"`((?:src|tests|tools|bench|\.ci)/[\w./-]+)`", text_of(path)):
        assert (ROOT / name).exists(), name


def test_no_file_names_the_workshop_or_where_packages_come_from() -> None:
    forbidden = ["/" + "work/", "python" + "hosted.org", "py" + "pi.org", "download.py" + "torch.org"]
    for path in tracked():
        content = path.read_bytes()
        for trace in forbidden:
            assert trace.encode() not in content, f"{trace} in {path.relative_to(ROOT)}"


def test_nothing_is_tracked_that_a_run_makes() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in tracked()}
    assert not {"uv.lock", ".env", "config.toml"} & names
    assert not [name for name in names if name.startswith(("checkpoints/", "out/", ".venv/")) or "__pycache__" in name]
