"""Plain explanations of why a model cannot be loaded."""

from huggingface_hub import errors as hub_errors
from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError
from ..utils import first_line
from .source import ModelSource


def explain(source: ModelSource, error: BaseException) -> str:
    """Why a model cannot be loaded and what to do, from the chain of causes, which transformers' message hides."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(item) for item in chain)

    def caused_by(*types: type[BaseException]) -> bool:
        return any(isinstance(item, types) for item in chain)

    name = source.name
    if caused_by(hub_errors.GatedRepoError):
        return f"The model {name} is gated. Accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN."
    if caused_by(hub_errors.RevisionNotFoundError) or "is not a valid git identifier" in text:
        return f"The model {name} has no revision {source.revision!r}. Check --model-commit."
    if caused_by(hub_errors.RepositoryNotFoundError):
        return (
            f"The model {name} is neither a local folder nor on the hub, or it is private. Check the name; "
            "for a private model log in with `hf auth login` or set HF_TOKEN."
        )
    if "does not appear to have a file named config.json" in text or ("Should have a `model_type` key" in text and not source.is_local):
        return f"The model {name} has no config.json that names its type. If it has GGUF files, choose one with --gguf-file."
    if "trust_remote_code" in text:
        return f"The model {name} needs its own Python code. Read it, and if you trust it, add --trust-remote-code."
    if "model_type" in text or "does not recognize this architecture" in text:
        return f"The installed transformers does not support the type of the model {name}. Update transformers. ({first_line(error)})"
    if caused_by(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError) or "connect" in text:
        return (
            f"The model {name} is not a local folder, not in the cache, and the hub cannot be reached. Check the name, the network, "
            "and HF_ENDPOINT or HF_HUB_OFFLINE if they are set."
        )
    return f"The model {name} cannot be loaded: {first_line(error)}"


def refuse_encoder_decoder(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` for encoder-decoder models."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"Models of type {config.model_type} are not supported: it is an encoder with a decoder; only decoders that stand alone can be "
            "edited."
        )
