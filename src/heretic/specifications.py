"""Tables among the settings: where prompts come from, and what the search does with a scorer's figure."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import did_you_mean
from .utils import JsonObject


class PromptSpecification(BaseModel):
    """Where a list of prompts comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(min_length=1, description="Hub id, local dataset folder, or a text file with one prompt a line.")
    commit: str | None = Field(None, description="Revision of a hub dataset to pin.")
    split: str | None = Field(None, description="Split, with an optional slice such as train[:400]; a slice alone for a text file.")
    column: str | None = Field(None, description="Column that holds the prompts; not needed for a text file.")
    prefix: str = Field("", description="Text put before each prompt.")
    suffix: str = Field("", description="Text put after each prompt.")
    system_prompt: str | None = Field(None, description="System prompt for these prompts instead of the general one.")
    residual_plot_label: str | None = Field(None, description="Name of these prompts in plots of the residuals.")
    residual_plot_color: str | None = Field(None, description="Their colour there: a name such as royalblue, or #4169e1.")

    @property
    def what_is_read(self) -> "PromptSpecification":
        """The same without what only a plot shows."""
        return self.model_copy(update={"residual_plot_label": None, "residual_plot_color": None})


class ScorerSpecification(BaseModel):
    """A scorer by name: where its class is, what the search does with its figure, and its own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    use: str | None = Field(
        None,
        min_length=1,
        description="Built-in scorer, package.module:Class or file.py:Class; the built-in one of this name if not given.",
    )
    direction: Literal["minimize", "maximize", "none"] | None = Field(
        None, description="What the search does with the figure; none (usual) reports it."
    )
    finalists_only: bool | None = Field(None, description="Only for the trials scored again at the end; not for an objective.")
    settings: JsonObject = Field({}, description="The scorer's own settings.")

    @property
    def is_custom(self) -> bool:
        """Whether it is code that does not come with this program: a file or an import path."""
        return self.use is not None and ":" in self.use


# What every run is scored by; the table `scorers` changes them and adds others.
USUAL_SCORER = ScorerSpecification(direction="none", finalists_only=False)
SCORERS = {
    "refusals": ScorerSpecification(direction="minimize", finalists_only=False),
    "kl_divergence": ScorerSpecification(direction="minimize", finalists_only=False),
    "sequence_kl_divergence": USUAL_SCORER,
    "harmless_refusals": ScorerSpecification(direction="none", finalists_only=True),
}
Objectives = tuple[tuple[str, Literal["minimize", "maximize"]], ...]
DEFAULT_OBJECTIVES: Objectives = (("refusals", "minimize"), ("kl_divergence", "minimize"))


def check_scorers(scorers: Mapping[str, ScorerSpecification]) -> None:
    """Raise `ValueError` for a scorer that says what cannot be."""
    for name, scorer in scorers.items():
        if scorer.use is None and name not in SCORERS:
            raise ValueError(f"{name} is no built-in scorer{did_you_mean(name, list(SCORERS))}; say which class it is with use")
        if scorer.use is not None and name in SCORERS:
            raise ValueError(f"{name} is the name of a built-in scorer; give the one that you use another name")
        if scorer.finalists_only and scorer.direction not in (None, "none"):
            raise ValueError(f"{name} cannot be an objective (direction) and computed for finalists only")
        if scorer.finalists_only and name in ("refusals", "kl_divergence", "sequence_kl_divergence"):
            raise ValueError(f"{name} is computed for every trial; it cannot be for finalists_only")


def scorer_in_force(name: str, given: Mapping[str, ScorerSpecification]) -> ScorerSpecification:
    """A scorer with the defaults of what is not `given`."""
    usual, own = SCORERS.get(name, USUAL_SCORER), given.get(name, ScorerSpecification())
    direction = own.direction or usual.direction
    finalists_only = usual.finalists_only if own.finalists_only is None else own.finalists_only
    values = {"direction": direction, "finalists_only": finalists_only and direction == "none", "settings": own.settings}
    return own.model_copy(update=values)
