"""Removes access tokens, and paths (which contain user names) from public texts. Imports nothing heavy."""

import re
from pathlib import Path

from huggingface_hub import get_token

from .loading.source import ModelSource, expand
from .utils import JsonObject

# Settings with free text; every other string may be a path or a URL.
TEXTS = ("system_prompt", "prefix", "suffix", "response_prefix", "refusal_markers", "chain_of_thought_skips")
# Settings of where a result was saved or uploaded to, which are private.
WITHHELD = ("save_directory", "upload_repo_id")

# Substrings of URL parameter names whose values are secret.
_SECRET = re.compile(r"([?&][^=&]*(?:pass|pwd|secret|token|key)[^=&]*=)[^&]*", re.IGNORECASE)
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def without_token(text: str, token: str | None = None) -> str:
    """A text in which an access token (default: the one that the hub's client would use) is replaced by `[token]`."""
    token = get_token() if token is None else token
    return text.replace(token, "[token]") if token else text


def public_name(name: str) -> str:
    """The public name of a model, dataset or file: the last part of an absolute path or one that leads out of the working directory; the
    scheme of a URL (`postgresql://...`); a hub id or relative path is unchanged.
    """
    if address := _ADDRESS.match(name):
        return f"{address[1]}://..."
    path = expand(name)
    return _last_part(path) if path.is_absolute() or ".." in path.parts else name


def public_model_name(source: ModelSource) -> str:
    """The public name of a model: its hub id, or the name of its folder."""
    return source.repository or _last_part(expand(source.name))


def _last_part(path: Path) -> str:
    return path.name if path.name not in ("", "..") else path.resolve().name


def public_settings(settings: JsonObject) -> JsonObject:
    """Settings (from `model_dump`) without local paths, URLs and account names."""
    return {name: None if name in WITHHELD else value if name in TEXTS else _public(value) for name, value in settings.items()}


def _public(value: object) -> object:
    if isinstance(value, str):
        return public_name(value)
    if isinstance(value, dict):
        return public_settings(value)
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    return value


def shown_location(url: str) -> str:
    """The storage URL of a shared study for printing, without passwords.

    SQLAlchemy's parser finds the password. In a URL that it cannot parse, everything up to the last `@` is masked.
    """
    scheme, is_url, rest = url.partition("://")
    if not is_url:
        return url
    from sqlalchemy.engine import make_url  # heavy, and only a study in a database needs it
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
        is_understood = scheme != "grpc" and "@" not in f"{parsed.host or ''}{parsed.database or ''}{'&'.join(parsed.query)}"
    except (ArgumentError, ValueError):
        is_understood = False
    if is_understood:
        shown = url if parsed.password is None else parsed.render_as_string(hide_password=True)
    else:
        _, at, after = rest.rpartition("@")
        shown = f"{scheme}://***@{after}" if at else url
    return _SECRET.sub(r"\1***", shown)
