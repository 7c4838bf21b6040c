"""How the place of a shared study is written, and how it may be shown. Imports nothing heavy."""

import re

# Words in the names of a URL's parameters whose values are secret.
_SECRET = re.compile(r"([?&][^=&]*(?:pass|pwd|secret|token|key)[^=&]*=)[^&]*", re.IGNORECASE)


def is_file(url: str) -> bool:
    """Whether a storage is a journal file: a path."""
    return "://" not in url


def shown_location(url: str) -> str:
    """A storage as it may be printed: without passwords, whatever characters they hold.

    SQLAlchemy's parser says what the password is. Of a URL that it does not understand everything up to the last `@` is masked.
    """
    if is_file(url):
        return url
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme, _, rest = url.partition("://")
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
