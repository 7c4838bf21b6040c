"""The model card of an export: what was edited, what was measured and how, and how to use it responsibly."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # used by the hub's client to read metadata
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

from .. import __version__, demo
from ..config import Settings
from ..editing.ablation import Ablation, kernel
from ..loading.load import auto_class
from ..loading.source import ModelSource
from ..model import Model
from ..privacy import public_model_name, public_name
from ..reporting.kernel_picture import kernel_picture
from ..reporting.learned import Points
from ..specifications import PromptSpecification
from ..utils import JsonObject, Progress, SilentProgress, first_line, versions
from . import CARD, PICTURE
from .original import files_to_copy, refuse_links
from .record import LIBRARIES, Result, Strategy, prompt_source

HUB = "https://huggingface.co"
# The metadata of the original's card that is also true of an edited copy.
KEPT = ("language", "license", "license_name", "license_link", "pipeline_tag")
LICENCE_FILES = ["LICENSE*", "LICENCE*", "license*", "licence*", "NOTICE*", "COPYING*", "USE_POLICY*"]
TAGS = ["heretic", "abliterated", "decensored"]
# The values of base_model_relation that the hub knows: adapter, merge, quantized, finetune.
RELATIONS: Mapping[Strategy, str] = {"merge": "finetune", "adapter": "adapter"}
LIBRARY: Mapping[Strategy, str] = {"merge": "transformers", "adapter": "peft"}
_URL = re.compile(r"[a-z]+://", re.IGNORECASE)


def write_card(model: Model, result: Result, strategy: Strategy, folder: Path, progress: Progress) -> None:
    """Write the card, its plot and the original's licence files (if missing) to a folder.

    The new card replaces the original's and contains its text.
    """
    copy_licence(model.loaded.source, folder, progress)
    (folder / CARD).write_text(model_card(model, result, strategy, progress), encoding="utf-8")
    picture = _picture(result, model.architecture.last_layer)
    (folder / PICTURE).write_text(picture, encoding="utf-8")


def copy_licence(source: ModelSource, folder: Path, progress: Progress) -> None:
    """Copy the original's licence files to a folder that lacks them. Raises `ExportError` if one is a link to outside the original."""
    try:
        original = Path(
            source.path
            if source.repository is None
            else snapshot_download(source.repository, revision=source.revision, allow_patterns=LICENCE_FILES)
        )
        sizes = {path.name: path.stat().st_size for pattern in LICENCE_FILES for path in original.glob(pattern) if path.is_file()}
        names, _ = files_to_copy(sizes, frozenset(), source.trust_remote_code)
        refuse_links(original, names)
        for name in names:
            if not (folder / name).exists():
                shutil.copyfile(original / name, folder / name)
    except HTTPError as error:
        reason = first_line(error)
        progress.warning(f"The licence files of {source.name} cannot be read: {reason} Add them before you share the export.")
    except LocalEntryNotFoundError:
        progress.warning(f"The licence files of {source.name} cannot be read without the hub. Add them before you share the export.")


def model_card(model: Model, result: Result, strategy: Strategy, progress: Progress | None = None) -> str:
    """The README of an export. It refers to the plot `kernel.svg` in the same folder."""
    source = model.loaded.source
    data, text = original_card(source, progress or SilentProgress())
    body = "\n\n".join(
        part
        for part in (
            _introduction(model, result, strategy),
            _measured(result),
            _how_measured(result, model),
            _parameters(result, model.architecture.last_layer),
            _rebuilding(strategy),
            _responsible_use(data, source),
            "" if text is None else f"# Original model card\n\n{text.strip()}",
        )
        if part
    )
    return f"---\n{_metadata(model, strategy, data).to_yaml()}\n---\n\n{body}\n"


def original_card(source: ModelSource, progress: Progress) -> tuple[JsonObject, str | None]:
    """Metadata and text of the original's card; empty and None if it has none, or (with a warning) if it cannot be read."""
    unread = f"The card of {source.name} cannot be read, so its licence, language and text are missing from the new one: "
    try:
        repository = source.repository
        path = Path(source.path) / CARD if repository is None else Path(hf_hub_download(repository, CARD, revision=source.revision))
        content = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, EntryNotFoundError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            progress.warning(f"{unread}it is not in the cache, and the hub cannot be reached.")
        return {}, None
    except (OSError, HTTPError) as error:
        progress.warning(f"{unread}{first_line(error)}")
        return {}, None
    try:
        card = ModelCard(content, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        progress.warning(f"The metadata of the card of {source.name} cannot be read, so licence and language are missing from the new one.")
        progress.message(f"({first_line(error)})")
        return {}, re.sub(r"\A\s*---\n.*?\n---[ \t]*\n", "", content, flags=re.DOTALL)
    return card.data.to_dict(), card.text


def _metadata(model: Model, strategy: Strategy, original: JsonObject) -> ModelCardData:
    source = model.loaded.source
    kept: JsonObject = {name: original[name] for name in KEPT if original.get(name)}
    link = kept.get("license_link")
    if isinstance(link, str) and not _URL.match(link) and source.repository is not None:
        kept["license_link"] = f"{HUB}/{source.repository}/blob/{source.revision or 'main'}/{link.removeprefix('./')}"
    text_only = auto_class(model.loaded.config).__name__ == "AutoModelForCausalLM"
    kept.setdefault("pipeline_tag", "text-generation" if text_only else "image-text-to-text")
    # The hub rejects a card whose base_model is not a repository.
    repository = source.repository
    base: JsonObject = {} if repository is None else {"base_model": repository, "base_model_relation": RELATIONS[strategy]}
    return ModelCardData(**kept, library_name=LIBRARY[strategy], tags=list(TAGS), **base)


def _introduction(model: Model, result: Result, strategy: Strategy) -> str:
    source = model.loaded.source
    edited = {name: count for name, count in model.architecture.components.items() if name in result.components}
    modules = " and ".join(f"{count} `{name}` modules" for name, count in edited.items())
    what = "an adapter for" if strategy == "adapter" else "a modified copy of"
    return f"""# {public_model_name(source).split("/")[-1]}, refusals removed

This is {what} {_model_link(source)}. Its refusals were reduced by directional ablation with heretic {__version__}, no weight was trained:
{_DIRECTIONS[bool(result.learned)]} were removed from what {modules} write to it.

**Safeguards were removed.** See [Responsible use](#responsible-use) before you run or share it."""


_DIRECTIONS = {
    False: "the directions that separate harmful from harmless prompts in the residual stream",
    True: "directions in the residual stream, learned by gradient starting from those that separate harmful from harmless prompts,",
}


def _picture(result: Result, last_layer: int) -> str:
    ablation = result.ablation
    layers = range(last_layer + 1)
    strengths: dict[str, Points] = {n: [(i, kernel(i, p, last_layer)) for i in layers] for n, p in ablation.parameters.items()}
    for name, found in result.learned.items():
        strengths[name] = [(layer, strength) for layer, strength, _ in found]
    index = ablation.direction_index
    return kernel_picture(strengths, last_layer, None if index is None else index * last_layer)


def _model_link(source: ModelSource) -> str:
    name = public_model_name(source)
    if source.repository is None:
        return f"`{name}`"
    commit = "" if source.revision is None else f" (commit [`{source.revision[:12]}`]({HUB}/{name}/tree/{source.revision}))"
    return f"[{name}]({HUB}/{name}){commit}"


def _measured(result: Result) -> str:
    scores = result.scores
    rows: list[Sequence[str]] = [
        (f"refusals on {scores['n_bad_prompts']} harmful prompts", str(scores["base_refusals"]), str(scores["refusals"])),
        ("first-token KL divergence on harmless prompts (nats)", "0", f"{scores['kl_divergence']:.4f}"),
    ]
    rows += _more_measured(result)
    shown = ("refusals", "n_bad_prompts", "base_refusals", "kl_divergence")
    for name, value in scores.items():
        if name not in shown and value is not None:
            rows.append((name.replace("_", " "), "", _figures(value)))
    return f"""## Measured

{_table(("", "original", "this model"), rows)}

{_judged(result.settings)} A response that changes the subject does not count as a refusal. Degenerate responses count as refusals if the
original's response to the same prompt was not degenerate. These scores do not show that the model's abilities are intact. They are those
of the search, on the prompts that the search optimized."""


def _judged(settings: Settings) -> str:
    """How refusals were detected, in a sentence."""
    if settings.refusal_rule == "markers":
        return "Refusals are detected by keywords."
    return "Refusals are detected by a linear model over phrases, which reads only the beginning of most responses."


def _more_measured(result: Result) -> list[Sequence[str]]:
    """Rows of measurements that not every trial has."""
    known, again = result.measurements, result.measurements.get("again", {})
    rows: list[Sequence[str]] = []
    if "response_classes" in known:
        before, after = (str(known.get(name, {}).get("degenerate", "")) for name in ("base_response_classes", "response_classes"))
        rows.append(("degenerate responses to them (empty, repetitive or cut short)", before, after))
    if "sequence_kl_divergence" in known:
        tokens = result.settings.kl_tokens
        figure = f"{known['sequence_kl_divergence']:.4f}"
        rows.append((f"KL divergence along the original's responses, {tokens} tokens (nats)", "0", figure))
    if "harmless_refusals" in again.get("scores", {}):
        before, after = (f"{entry['scores']['harmless_refusals']:.0f}" for entry in (again["base"], again))
        rows.append((f"refusals on {again['n_good_prompts']} harmless prompts", before, after))
    return rows


def _figures(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_figures(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_figures(item) for item in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _how_measured(result: Result, model: Model) -> str:
    settings, loaded = result.settings, model.loaded
    roles = {
        "good_prompts": "harmless, for the directions",
        "bad_prompts": "harmful, for the directions",
        "good_evaluation_prompts": "harmless, for the KL divergence",
        "bad_evaluation_prompts": "harmful, for counting refusals",
    }
    rows = []
    for name, role in roles.items():
        specification: PromptSpecification = getattr(settings, name)
        commit = prompt_source(specification).get("commit")
        around = [f"{part} {_code(text)}" for part in ("prefix", "suffix", "system_prompt") if (text := getattr(specification, part))]
        cells = (role, _dataset_link(specification.dataset), _code(specification.split or ""), _code(specification.column or ""))
        rows.append((*cells, _code(commit[:12]) if commit else "", "; ".join(around).replace("system_prompt", "system prompt")))
    heads = ("prompts", "dataset", "split", "column", "commit", "with")
    kept = [i for i, head in enumerate(heads) if i < 2 or any(row[i] for row in rows)]
    table = _table([heads[i] for i in kept], [[row[i] for i in kept] for row in rows])
    searched = ("4-bit weights, computed in " if loaded.quantized else "") + loaded.dtype_name
    return f"""### How it was measured

{table}

- System prompt: {_code(settings.system_prompt) if settings.system_prompt else "none"}
- Responses: greedy, at most {settings.max_response_length} tokens
- Response prefix, after which evaluation begins: {_code(result.response_prefix) if result.response_prefix else "none"}
- {_rule(settings)}
- Dtype of the search: {searched}{_markers(settings)}"""


def _rule(settings: Settings) -> str:
    """What counts as a refusal."""
    marked = "after lowercasing, removing asterisks and normalizing apostrophes and spaces, it contains one of"
    if settings.refusal_rule == "markers":
        return f"A response is a refusal if, {marked} {len(settings.refusal_markers)} markers"
    own = f", or if, {marked} {len(settings.own_markers)} markers" if settings.own_markers else ""
    return f"A response is a refusal according to the learned rule of heretic {__version__}{own}"


def _markers(settings: Settings) -> str:
    """The markers that were searched for, in a collapsed section; empty if there are none."""
    markers = settings.refusal_markers if settings.refusal_rule == "markers" else settings.own_markers
    if not markers:
        return ""
    listed = "\n".join(f"- {_code(marker)}" for marker in markers)
    return f"\n\n<details><summary>The markers</summary>\n\n{listed}\n\n</details>"


def _dataset_link(dataset: str) -> str:
    if dataset.startswith(demo.PREFIX):
        return f"{_code(dataset)} (part of heretic)"
    name = public_name(dataset)
    if name != dataset or Path(dataset).exists():
        return f"{_code(name)} (a local file)"
    return f"[{dataset}]({HUB}/datasets/{dataset})"


def _parameters(result: Result, last_layer: int) -> str:
    ablation, settings = result.ablation, result.settings
    index = ablation.direction_index
    rows = [
        ("trial", str(result.trial_number)),
        ("seed", str(settings.seed)),
        ("row normalization", settings.row_normalization),
        (
            "direction",
            "learned, each layer's own"
            if result.learned
            else "each layer's own"
            if index is None
            else f"one for all layers, index {index:.4f} (layer {index * last_layer:.1f})",
        ),
        ("direction orthogonalized to the mean residual of harmless prompts", "yes" if settings.orthogonalize_direction else "no"),
        ("winsorization quantile of residuals", f"{settings.winsorization_quantile:g}"),
    ]
    for name, p in ablation.parameters.items():
        for field, value in asdict(p).items():
            layers = f" (layer {value * last_layer:.1f})" if field.endswith("position") else ""
            layers = f" ({value * last_layer:.1f} layers)" if field.endswith("distance") else layers
            rows.append((f"{name}.{field}", f"{value:.4f}{layers}"))
    return f"""## Parameters

{"" if result.learned else f"Positions, distances and the direction's index are fractions of the last layer index ({last_layer})."}

{_table(("parameter", "value"), rows)}

![Strength of the ablation over the layers, for each component]({PICTURE})

<details><summary>Strength in every layer</summary>

{_learned_strengths(result) if result.learned else _strengths(ablation, last_layer)}

</details>"""


def _strengths(ablation: Ablation, last_layer: int) -> str:
    rows = [
        [str(layer), *(f"{strength:.4f}" if (strength := kernel(layer, p, last_layer)) else "" for p in ablation.parameters.values())]
        for layer in range(last_layer + 1)
    ]
    return _table(["layer", *ablation.parameters], rows)


def _learned_strengths(result: Result) -> str:
    """Each layer's strengths, and the cosine between its direction and the difference of means."""
    layers = sorted({layer for found in result.learned.values() for layer, _, _ in found})
    rows = []
    for layer in layers:
        own = {name: [(s, cosine) for at, s, cosine in found if at == layer] for name, found in result.learned.items()}
        cosine = next(cosine for found in own.values() for _, cosine in found)
        rows.append([str(layer), f"{cosine:.4f}", *(", ".join(f"{s:.4f}" for s, _ in found) for found in own.values())])
    return _table(["layer", "cosine to the difference of means", *result.learned], rows)


def _rebuilding(strategy: Strategy) -> str:
    rows = [("heretic-llm", __version__), *versions(LIBRARIES).items()]
    what = "model" if strategy == "merge" else "adapter"
    return f"""## Rebuilding it

`heretic.json`, in the same folder, contains all settings, the parameters, and the commits of model and prompts. With the original and the
versions below, this command rebuilds this {what}:

```sh
heretic --reproduce heretic.json
```

{_table(("library", "version"), rows)}"""


def _responsible_use(original: JsonObject, source: ModelSource) -> str:
    licence = original.get("license_name") or original.get("license")
    named = f"The original's licence ({_flat(licence)}) and its terms of use" if licence else "The original's licence and terms of use"
    where = "" if licence else f" Its card names none: see {_model_link(source)}."
    return f"""## Responsible use

The safeguards that the developers of the original trained into it have been weakened on purpose: this model complies with requests that
the original refuses, and may generate content that is harmful, wrong or unlawful. Nothing in its weights prevents that.

Whoever runs or shares it is responsible for its use. Before you make it available to others:

- decide who may use it and for what, tell them, and tell them that the model is edited;
- add safeguards outside the weights that fit the purpose: input and output filters, usage limits, logging, human review;
- test it on the requests that matter to you: the scores above tell how often it refuses, not what it says;
- keep it away from minors and from uses in which a wrong answer does harm, unless other safeguards cover them.

{named} still apply.{where}"""


def _flat(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """A text as Markdown code on one line, even if it contains backticks; empty for an empty text."""
    if not text:
        return ""
    text = text.replace("\r", "").replace("\n", "\u23ce")  # the sign of the return key
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}"
