"""How the place of a shared study is written, and how it may be shown. Imports nothing heavy."""

from urllib.parse import urlsplit, urlunsplit


def is_file(url: str) -> bool:
    """Whether a storage is a journal file: a path."""
    return "://" not in url


def shown_location(url: str) -> str:
    """A storage as it may be printed: without the password."""
    parts = urlsplit(url)
    if is_file(url) or parts.password is None:
        return url
    user = f"{parts.username}:***@" if parts.username else "***@"
    return urlunsplit(parts._replace(netloc=user + parts.netloc.rpartition("@")[2]))
