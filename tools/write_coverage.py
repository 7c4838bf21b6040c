"""Writes docs/coverage.md: what is found in a tiny model of every type that transformers calls a language model.

python tools/write_coverage.py
"""

import importlib
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from heretic.editing.architecture import Architecture, Writer
from heretic.editing.completeness import remainder
from heretic.editing.discovery import discover
from heretic.editing.hooks import batches_trials

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
zoo: Any = importlib.import_module("zoo")

HEAD = """# Which models

Every type of decoder that transformers {version} can build: what writes to its residual stream, and how its weights are stored.
Made by `tools/write_coverage.py` from tiny models with random weights, the same that `tests/test_coverage.py` edits, decodes, exports
and loads again.

- **{whole} types whole**: after an ablation of strength 1 of all writers nothing of the direction is left in the stream, to rounding.
- **{inexact} types approximately**: everything that writes is edited, but the model does something to its stream that no edit of weights
  can follow. The program says so when it loads such a model, with the share that stays.
- **{refused} types refused**: encoders, and encoders with decoders.
- **{other} types not tried**: transformers does not build them from their default configuration made small, or they do not run on text
  alone.

A count such as 2 × 4 means two modules of four experts each. `(in, out)` marks weights that are stored transposed, `+ bias` biases that are
edited too, `after norm` a norm between the writer and the stream, whose gain turns the direction. "One at a time" means that trials are not
computed together in modes `pre` and `full`, which costs time.

| type | attention | mixers | MLP and experts | status |
| --- | --- | --- | --- | --- |
"""


def kind(writer: Writer, architecture: Architecture) -> str:
    """A writer in words: its path inside the layer, and how it is stored."""
    path = re.sub(r"\.\d+(?=\.|$)", ".*", writer.name.removeprefix(f"{architecture.layers_name}.").partition(".")[2])
    storage = writer.storage
    if storage.weight not in ("weight", None):
        path += f".{storage.weight}"
    notes = []
    transposed = storage.axis == (1 if storage.n_experts is None else 2)
    notes += ["(in, out)"] if transposed and storage.weight else []
    notes += ["a bias alone"] if storage.weight is None else ["+ bias"] if storage.bias else []
    notes += ["after norm"] if writer.gain is not None else []
    return " ".join([f"`{path}`", *notes])


def cell(architecture: Architecture, component: str) -> str:
    counts: dict[tuple[str, int | None], int] = {}
    for writer in architecture.writers:
        if writer.component == component:
            key = kind(writer, architecture), writer.storage.n_experts
            counts[key] = counts.get(key, 0) + 1
    return "<br>".join(f"{n}{'' if experts is None else f' × {experts}'} {text}" for (text, experts), n in counts.items())


def row(model_type: str) -> str:
    model = zoo.build(model_type)
    architecture = discover(model)
    left = remainder(model, architecture)
    status = "whole" if model_type not in zoo.INEXACT else f"approximately: {zoo.INEXACT[model_type]}"
    if left.is_inexact(torch.float32) != (model_type in zoo.INEXACT):
        raise SystemExit(f"{model_type}: {left.direction:.1e} of a direction stays")
    status += "" if batches_trials(architecture, "full") else "; one at a time"
    cells = [cell(architecture, component) for component in ("attn.o_proj", "mixer.out_proj", "mlp.down_proj")]
    return f"| {model_type} | {' | '.join(cells)} | {status} |"


def reasons(title: str, types: dict[str, str]) -> str:
    lines = "\n".join(f"- {name}: {text}" for name, text in types.items())
    return f"\n## {title}\n\n{lines}\n"


def main() -> None:
    """Writes the file."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    rows = [row(model_type) for model_type in zoo.DECODERS]
    refused = dict.fromkeys(zoo.ENCODERS, "an encoder") | dict.fromkeys(zoo.ENCODER_DECODERS, "an encoder with a decoder")
    untried = {t: f"not built ({text})" for t, text in zoo.NOT_BUILT.items()}
    untried |= {t: f"does not run on text as it is built here ({text})" for t, text in zoo.NOT_RUN.items()}
    untried |= dict.fromkeys(zoo.NOT_TEXT, "a classifier of pictures")
    head = HEAD.format(
        version=transformers.__version__,
        whole=len(zoo.DECODERS) - len(zoo.INEXACT),
        inexact=len(zoo.INEXACT),
        refused=len(refused),
        other=len(untried),
    )
    target = ROOT / "docs" / "coverage.md"
    target.parent.mkdir(exist_ok=True)
    tail = reasons("Refused", dict(sorted(refused.items()))) + reasons("Not tried", dict(sorted(untried.items())))
    target.write_text(head + "\n".join(rows) + "\n" + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
