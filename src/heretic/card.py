"""The model card of what was exported: what was done, what was measured, and what that means for whoever uses it."""

from dataclasses import asdict
from pathlib import Path

from . import __version__
from .model import Model
from .record import Result, Strategy


def model_card(model: Model, result: Result, strategy: Strategy) -> str:
    """The README of a saved model: what was done, what was measured, and what that means for whoever uses it."""
    source, settings, scores = model.loaded.source, result.settings, result.scores
    on_hub = not Path(source.path).is_dir()  # the hub refuses a card that names anything else
    relation = "finetune" if strategy == "merge" else "adapter"
    front_matter = ["---", f"library_name: {'transformers' if strategy == 'merge' else 'peft'}"]
    if on_hub:
        front_matter += [f"base_model: {source.name}", f"base_model_relation: {relation}"]
    front_matter += ["tags:", "- heretic", "- abliterated", "- decensored", "---"]
    index = result.ablation.direction_index
    rows = [("direction", "each layer's own" if index is None else f"one for all layers, index {index:.4f} of the last layer")]
    for name, p in result.ablation.parameters.items():
        rows += [(f"{name}.{field}", f"{value:.4f}") for field, value in asdict(p).items()]
    parameters = "\n".join(f"| {name} | {value} |" for name, value in rows)
    modules = " and ".join(f"{count} `{name}` modules" for name, count in model.architecture.components.items())
    return f"""{chr(10).join(front_matter)}

# {source.name.rstrip("/").split("/")[-1]}, refusals removed

This is {"an adapter for" if strategy == "adapter" else "a modified copy of"} `{source.name}`. Its refusals were reduced by directional
ablation with heretic {__version__}, without training: the directions that tell refused prompts from answered ones in the residual stream
were taken out of what {modules} write to it.

## Measured

| | original | this model |
| --- | --- | --- |
| refusals on {scores["n_bad_prompts"]} prompts that are to be refused | {scores["base_refusals"]} | {scores["refusals"]} |
| first-token KL divergence on harmless prompts (nats) | 0 | {scores["kl_divergence"]:.4f} |

Refusals are counted by keywords in the first {settings.max_response_length} tokens, so an answer that changes the subject counts
as an answer. The divergence looks at the first token only. Neither says that the model's abilities are unharmed.

## Parameters

Row normalization `{settings.row_normalization}`. Positions and distances are fractions of the last layer index
({len(model.architecture.layers) - 1}).

| parameter | value |
| --- | --- |
{parameters}

`heretic.json` holds every setting and version.

## Responsible use

The safeguards that the original's makers trained into it have been weakened on purpose: this model answers requests that the original
declines, and may produce content that is harmful, wrong or unlawful. Whoever runs or shares it answers for what is done with
it, and should add safeguards that fit the purpose. The original's licence and terms of use still apply.
"""
