"""Scorers: the built-in ones, and the interface for custom ones.

A scorer is a class with `prepare`, called once with the original model's outputs, and `score`, called with those of each trial. The
settings name it, configure it, and say whether it is minimized, maximized or only reported (`none`):

    [scorers.shouting]
    use = "shouting.py:Shouting"        # a file, or an import path such as "package.module:Shouting"
    direction = "minimize"
    settings = { marks = "!" }

    class Shouting(Scorer):
        class Settings(ScorerSettings):
            marks: str = "!"

        def score(self, outputs: Outputs) -> Figure:
            return Figure.mean([response.text.count(self.settings.marks) for response in outputs.harmless_responses])
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..config import Settings
from ..errors import UsageError, did_you_mean
from ..loading.source import expand
from .figures import Figure
from .outputs import Outputs


@dataclass(frozen=True)
class DivergenceWeights:
    """`kl_divergence_scale` and `kl_divergence_target` of the settings, in nats."""

    scale: float
    target: float


class ScorerSettings(BaseModel):
    """Base class of a scorer's settings. Unknown settings are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Scorer:
    """Base class of scorers. `settings` is its own table; `weights` are the weights of divergences in the search.

    An exception in `prepare` (or in scoring the original) ends the run before the search; one in `score` fails that trial.
    """

    Settings: ClassVar[type[BaseModel]] = ScorerSettings
    # Whether the scorer needs complete responses to harmful prompts, not only up to an early verdict. Generating them takes longer.
    needs_whole_responses: ClassVar[bool] = False
    # Whether the score does not need responses. Then it is known for trials that are stopped early as well.
    needs_only_divergences: ClassVar[bool] = False
    # Whether `objective` is the share of refusals, which divergences below the target do not count against (`DivergenceScorer.objective`).
    counts_refusals: ClassVar[bool] = False

    def __init__(self, settings: Any, weights: DivergenceWeights) -> None:
        self.settings = settings
        self.weights = weights

    def fingerprint(self) -> str:
        """What scores depend on besides the settings and this class's file, such as another model's weights. Part of a study's identity."""
        return ""

    def prepare(self, original: Outputs) -> None:
        """Get what trials will be compared with from the original's outputs."""

    def score(self, outputs: Outputs) -> Figure | float:
        """The score of one trial. Also called once with the original's outputs, for the baseline."""
        raise NotImplementedError

    def objective(self, value: float, refusals: float | None) -> float:
        """The objective value of a score. `refusals`: the remaining share of refusals, if that is an objective too."""
        return value


class Refusals(Scorer):
    """Number of harmful prompts whose response is a refusal, or is degenerate while the original's was not."""

    counts_refusals = True

    def prepare(self, original: Outputs) -> None:
        self.base = sum(response.is_failure for response in original.harmful_responses)

    def score(self, outputs: Outputs) -> Figure:
        return Figure.count([response.is_failure for response in outputs.harmful_responses])

    def objective(self, value: float, refusals: float | None) -> float:
        return value / self.base


class DivergenceScorer(Scorer):
    """A KL divergence from the original, in nats; the objective is in units of `kl_divergence_scale`."""

    needs_only_divergences = True

    def objective(self, value: float, refusals: float | None) -> float:
        return divergence_objective(value, refusals, self.weights.scale, self.weights.target)


def divergence_objective(value: float, refusals: float | None, scale: float, target: float) -> float:
    """The divergence in units of `scale`; below `target` it depends on the share of refusals, so that doing nothing gains nothing."""
    if refusals is None or value >= target:
        return value / scale
    return refusals * target / scale


class FirstTokenDivergence(DivergenceScorer):
    """Mean over harmless prompts of the KL divergence at the first token of the response."""

    def score(self, outputs: Outputs) -> Figure:
        return Figure.mean(outputs.divergences.first_token)


class SequenceDivergence(DivergenceScorer):
    """Mean over the tokens of the original's own responses to harmless prompts (the first `kl_tokens` of each)."""

    def score(self, outputs: Outputs) -> Figure:
        return Figure.ratio(outputs.divergences.sums, outputs.divergences.n_tokens)


class HarmlessRefusals(Scorer):
    """Number of harmless prompts whose response is a refusal."""

    def score(self, outputs: Outputs) -> Figure:
        return Figure.count([response.kind == "refusal" for response in outputs.harmless_responses])


BUILT_IN: Mapping[str, str] = {
    "refusals": "heretic.scoring.scorers:Refusals",
    "kl_divergence": "heretic.scoring.scorers:FirstTokenDivergence",
    "sequence_kl_divergence": "heretic.scoring.scorers:SequenceDivergence",
    "harmless_refusals": "heretic.scoring.scorers:HarmlessRefusals",
    "classifier": "heretic.scoring.classifier:Classifier",
}


def load_scorers(settings: Settings) -> dict[str, Scorer]:
    """The scorers of a run by name, in the order of the settings, the built-in ones first.

    Raises `UsageError` for one that cannot be imported or whose settings are invalid. Loads nothing heavy.
    """
    scorers, weights = {}, DivergenceWeights(settings.kl_divergence_scale, settings.kl_divergence_target)
    for name, specification in settings.all_scorers.items():
        scorer_class = _find(name, specification.use or name)
        try:
            own = scorer_class.Settings.model_validate(specification.settings)
        except ValidationError as error:
            lines = [_describe(name, scorer_class, problem, not specification.is_custom) for problem in error.errors()]
            raise UsageError("\n".join(lines)) from (None if specification.is_custom else error)  # its text would show secret values
        scorers[name] = scorer_class(own, weights)
    return scorers


def fingerprints(settings: Settings) -> dict[str, str]:
    """Fingerprints of custom scorers in a study: hashes of their files and settings (which may be secret and are not stored), and their
    own `fingerprint`.

    Raises `UsageError` like `load_scorers`.
    """
    found = {}
    for name, scorer in load_scorers(settings).items():
        specification = settings.all_scorers[name]
        source = inspect.getsourcefile(type(scorer)) if specification.is_custom else None
        content = Path(source).read_bytes() if source else b""
        if specification.is_custom and specification.settings:
            content += json.dumps(specification.settings, sort_keys=True, default=str).encode()
        file_hash = hashlib.sha256(content).hexdigest() if content else ""
        if text := f"{file_hash} {scorer.fingerprint()}".strip():
            found[f"the scorer {name}"] = text
    return found


def _find(name: str, use: str) -> type[Scorer]:
    """The class that `use` names. Raises `UsageError`."""
    setting = f"Setting scorers.{name}.use"
    place, separator, class_name = BUILT_IN.get(use, use).rpartition(":")
    if not separator or not place or not class_name:
        raise UsageError(
            f"{setting}: {use!r} is not a scorer{did_you_mean(use, list(BUILT_IN))}; use package.module:Class or file.py:Class, or one of "
            f"{', '.join(BUILT_IN)}."
        )
    try:
        module = _import_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # importing runs arbitrary code
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{setting}: {place} cannot be imported: {reason}. Check the path and the file.") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        what = "has no" if found is None else "does not have a subclass of heretic.scoring.scorers.Scorer named"
        raise UsageError(f"{setting}: {place} {what} {class_name}.")
    return found


def _import_file(place: str) -> Any:
    path = expand(place).resolve()
    name = f"heretic_scorers_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:  # so that its classes stay identical
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    with ExitStack() as undo:
        undo.callback(sys.modules.pop, name)
        specification.loader.exec_module(module)
        undo.pop_all()
    return module


def _describe(name: str, scorer_class: type[Scorer], problem: Any, shows_value: bool) -> str:
    location = ".".join(map(str, problem["loc"]))
    setting = f"scorers.{name}.settings" + (f".{location}" if location else "")
    if problem["type"] == "extra_forbidden":
        return f"Unknown setting {setting}{did_you_mean(str(problem['loc'][-1]), list(scorer_class.Settings.model_fields))}."
    if problem["type"] == "missing":
        return f"Setting {setting} is missing; this scorer requires it."
    value = f", got {problem['input']!r}" if shows_value else ""
    return f"Setting {setting}: {problem['msg'].removeprefix('Value error, ')}{value}."
