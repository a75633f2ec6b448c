"""Redis URLs as they may be shown: without their password."""

from urllib.parse import urlsplit, urlunsplit

_SECRET_OPTIONS = ("password=", "username=")


def masked_url(url: str) -> str:
    """The URL with `***` for its password, wherever that stands; one that can not be read is not shown at all."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        user = parts.username or ""
        credentials = f"{user}:***@" if parts.password is not None else (f"{user}@" if user else "")
    except ValueError:
        return "<unreadable URL>"
    query = "&".join(
        f"{option.partition('=')[0]}=***" if option.startswith(_SECRET_OPTIONS) else option
        for option in parts.query.split("&")
    )
    return urlunsplit((parts.scheme, credentials + host, parts.path, query, ""))
