"""Redis URLs as they may be shown: without their password."""

import re
from urllib.parse import unquote, urlsplit

UNREADABLE = "<unreadable URL>"
_SECRET_OPTION = re.compile("pass|user", re.IGNORECASE)


def masked_url(url: str) -> str:
    """The URL with `***` for its password, wherever that stands; one that can not be read is not shown at all.

    A lone user name is masked too: Redis has no use for one, so it is most likely a password without its colon.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises when an unescaped "/", "?" or "#" in the password has ended the host too early
    except ValueError:
        return UNREADABLE
    is_url = parts.scheme and url.lower().startswith(f"{parts.scheme}://")
    if not is_url or "@" in parts.path + parts.query + parts.fragment:
        return UNREADABLE
    credentials, at, host = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    query = "***" if _SECRET_OPTION.search(unquote(parts.query)) else parts.query
    return "".join(
        (parts.scheme, "://", user if colon else "", colon, "***" if at else "", at, host, parts.path)
        + (("?", query) if query else ())
    )
