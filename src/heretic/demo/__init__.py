"""The embedded demonstration: a tiny chat model that refuses one harmless subject, and its prompts."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
MODEL = DIRECTORY / "model"
BENCHMARKS = DIRECTORY / "benchmarks"
# A name instead of a path, so that stored settings do not depend on the installation folder.
PREFIX = "heretic-demo:"

PROMPTS = {
    "good_prompts": {"dataset": f"{PREFIX}good"},
    "bad_prompts": {"dataset": f"{PREFIX}bad"},
    "good_evaluation_prompts": {"dataset": f"{PREFIX}good_evaluation"},
    "bad_evaluation_prompts": {"dataset": f"{PREFIX}bad_evaluation"},
}


def prompt_file(dataset: str) -> Path:
    """The text file of a `heretic-demo:` name."""
    return DIRECTORY / "prompts" / Path(f"{dataset.removeprefix(PREFIX)}.txt").name
