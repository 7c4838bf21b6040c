"""Tables among the settings: where prompts come from, and what the search does with a scorer's figure."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .errors import did_you_mean
from .utils import JsonObject


class PromptSpecification(BaseModel):
    """The source of a list of prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(min_length=1, description="Hub id, local dataset folder, or a text file with one prompt per line.")
    commit: str | None = Field(None, description="Revision of a hub dataset: commit, tag or branch.")
    split: str | None = Field(
        None, description="Split, with an optional slice such as train[:400]; for a text file only a slice, or nothing."
    )
    column: str | None = Field(None, description="Column that contains the prompts; not needed for a text file.")
    prefix: str = Field("", description="Text inserted before each prompt.")
    suffix: str = Field("", description="Text appended to each prompt.")
    system_prompt: str | None = Field(None, description="System prompt for these prompts; the setting system_prompt if not given.")
    residual_plot_label: str | None = Field(None, description="Label of these prompts in residual plots.")
    residual_plot_color: str | None = Field(None, description="Color of these prompts in residual plots, such as royalblue or #4169e1.")

    @property
    def without_plot_options(self) -> "PromptSpecification":
        """The same without the options of residual plots, which do not affect the prompts."""
        return self.model_copy(update={"residual_plot_label": None, "residual_plot_color": None})


class ScorerSpecification(BaseModel):
    """A scorer: its class, what the search does with its score, and its own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    use: str | None = Field(
        None,
        min_length=1,
        description="Built-in scorer, package.module:Class or file.py:Class; the built-in scorer of this name if not given.",
    )
    direction: Literal["minimize", "maximize", "none"] | None = Field(
        None, description="Objective of the search (minimize or maximize), or none (default): only reported."
    )
    finalists_only: bool | None = Field(None, description="Compute it only for finalists; not possible for an objective.")
    settings: JsonObject = Field({}, description="The scorer's own settings.")

    @property
    def is_custom(self) -> bool:
        """Whether it is code from outside this package: a file or an import path."""
        return self.use is not None and ":" in self.use


# Scorers of every run; the table `scorers` changes them and adds others.
USUAL_SCORER = ScorerSpecification(direction="none", finalists_only=False)
SCORERS = {
    "refusals": ScorerSpecification(direction="minimize", finalists_only=False),
    "kl_divergence": ScorerSpecification(direction="minimize", finalists_only=False),
    "sequence_kl_divergence": USUAL_SCORER,
    "harmless_refusals": ScorerSpecification(direction="none", finalists_only=True),
}
Objectives = tuple[tuple[str, Literal["minimize", "maximize"]], ...]
DEFAULT_OBJECTIVES: Objectives = (("refusals", "minimize"), ("kl_divergence", "minimize"))


def _check_scorers(scorers: dict[str, ScorerSpecification]) -> dict[str, ScorerSpecification]:
    """Raise `ValueError` for a scorer with options that exclude each other."""
    for name, scorer in scorers.items():
        if scorer.use is None and name not in SCORERS:
            raise ValueError(f"{name} is not a built-in scorer{did_you_mean(name, list(SCORERS))}; set its class with use")
        if scorer.use is not None and name in SCORERS:
            raise ValueError(f"{name} is the name of a built-in scorer; give your scorer another name")
        if scorer.finalists_only and scorer.direction not in (None, "none"):
            raise ValueError(f"{name} cannot be both an objective (direction) and computed for finalists only")
        if scorer.finalists_only and name in ("refusals", "kl_divergence", "sequence_kl_divergence"):
            raise ValueError(f"{name} is computed for every trial; finalists_only cannot be set for it")
    return scorers


# The setting `scorers`: changes to the built-in scorers, and others by name.
Scorers = Annotated[dict[str, ScorerSpecification], AfterValidator(_check_scorers)]


def scorer_in_force(name: str, given: Mapping[str, ScorerSpecification]) -> ScorerSpecification:
    """A scorer with its defaults filled in."""
    usual, own = SCORERS.get(name, USUAL_SCORER), given.get(name, ScorerSpecification())
    direction = own.direction or usual.direction
    finalists_only = usual.finalists_only if own.finalists_only is None else own.finalists_only
    values = {"direction": direction, "finalists_only": finalists_only and direction == "none", "settings": own.settings}
    return own.model_copy(update=values)
