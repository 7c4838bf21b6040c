"""What the documents promise exists: options, settings, files, and the headings that links lead to."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from heretic.commands import rebuild
from heretic.config import PromptSpecification, Settings
from heretic.settings_sources import command_parser, load_settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("bench/*.md")])

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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_exist(path: Path) -> None:
    parser, _ = command_parser()
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z_]+)?", text_of(path).replace("--no-...", "")))
    benches = "".join(script.read_text(encoding="utf-8") for script in ROOT.glob("bench/*.py"))
    of_benches = re.findall(r'add_argument\("(--[a-z][\w-]*)"', benches)
    assert named <= {*parser._option_string_actions, *rebuild.FLAGS, *FOREIGN_OPTIONS, *of_benches}


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


def test_the_examples_for_library_users_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    text = text_of(ROOT / "README.md")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Settings(demo=True)" in block]
    exec(compile(example, "README.md", "exec"), {})
    scores, answers = capsys.readouterr().out.splitlines()
    assert re.match(r"100 Score\(refusals=\d+, kl_divergence=0\.0\d+, bounded=False\)", scores)
    assert answers.startswith("['")


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
