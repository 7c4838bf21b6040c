"""`heretic.json`: the model, the edit, versions and scores of a result."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from optuna.trial import FrozenTrial

from .. import __version__
from ..config import Settings
from ..device import hardware
from ..editing.ablation import Ablation
from ..loading.source import dataset_commit, fingerprint
from ..model import Model
from ..privacy import public_name, public_settings
from ..specifications import PromptSpecification
from ..utils import JsonObject, versions

Strategy = Literal["merge", "adapter"]

LIBRARIES = ("torch", "transformers", "accelerate", "optuna", "peft", "bitsandbytes", "huggingface-hub")


@dataclass(frozen=True)
class Result:
    """The chosen trial, with everything that its record contains."""

    settings: Settings
    trial_number: int
    ablation: Ablation
    refusals: int
    kl_divergence: float
    base_refusals: int
    n_bad_prompts: int
    response_prefix: str
    measurements: JsonObject = field(default_factory=dict)
    # For a learned trial, by component: layer, strength, and cosine to the difference of means of each module.
    learned: Mapping[str, Sequence[tuple[int, float, float]]] = field(default_factory=dict)

    @property
    def components(self) -> list[str]:
        """The components that are edited."""
        return list(self.learned or self.ablation.parameters)

    @property
    def scores(self) -> JsonObject:
        """In the format of `heretic.json`."""
        return {
            "refusals": self.refusals,
            "n_bad_prompts": self.n_bad_prompts,
            "base_refusals": self.base_refusals,
            "kl_divergence": self.kl_divergence,
        }


def measurements(trial: FrozenTrial, finalists: JsonObject, base_classes: Mapping[str, int]) -> JsonObject:
    """Measurements of a trial beyond its scores, in the format of `heretic.json`: response classes, further scores and, under `again`,
    those of scoring it again, with intervals. `finalists`: the study's attribute; `base_classes`: of the original's responses."""
    names = ("response_classes", "kl_statistics", "sequence_kl_divergence", "scores")
    found = {name: trial.user_attrs[name] for name in names if name in trial.user_attrs}
    found["base_response_classes"] = dict(base_classes)
    again = finalists.get("trials", {}).get(str(trial.number))
    if again is not None:
        conditions = {name: finalists[name] for name in ("conditions", "n_bad_prompts", "n_good_prompts", "base")}
        found["again"] = {**conditions, **again}
    return found


def prompt_source(specification: PromptSpecification) -> JsonObject:
    """A prompt source, with the commit that was read if it is on the hub."""
    commit = dataset_commit(specification.dataset, specification.commit)
    return public_settings(specification.model_dump(exclude_none=True)) | ({} if commit is None else {"commit": commit})


def record(model: Model, result: Result, strategy: Strategy) -> JsonObject:
    """`heretic.json`: the model, the edit, versions and scores of a result. Contains no local paths."""
    settings, loaded = result.settings, model.loaded
    sources = ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")
    return {
        "program": {"name": "heretic-llm", "version": __version__},
        "versions": versions(LIBRARIES),
        "model": {
            "name": public_name(loaded.source.name),
            "commit": loaded.source.revision,
            "gguf_file": loaded.source.gguf,
            "type": loaded.config.model_type,
            "fingerprint": fingerprint(loaded.source),
            "search_dtype": loaded.dtype_name,
        },
        "hardware": hardware(),
        "prompts": {name: prompt_source(getattr(settings, name)) for name in sources},
        "settings": public_settings(settings.stored()),
        "export_strategy": strategy,
        "response_prefix": result.response_prefix,
        "trial": {
            "number": result.trial_number,
            "origin": "learned" if result.learned else "search",
            "direction_index": result.ablation.direction_index,
            "parameters": None if result.learned else {name: asdict(p) for name, p in result.ablation.parameters.items()},
            **({"learned": {name: [list(writer) for writer in found] for name, found in result.learned.items()}} if result.learned else {}),
            "n_layers": len(model.architecture.layers),
            "modules": model.architecture.components,
        },
        "scores": result.scores,
        "measurements": public_settings(dict(result.measurements)),
    }
