"""URLs as they may be shown and written down."""

from __future__ import annotations

import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def without_secrets(location: str) -> str:
    """A location without user and password and, where it is http, without the query (a signature, often)."""
    scheme, mark, rest = location.partition("://")
    if not mark:
        return location
    if is_http(location):
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def without_secrets_in(text: str) -> str:
    """The same of every URL in a text, such as the message of a client's exception."""
    return _URL.sub(lambda match: without_secrets(match[0]), text)


def is_http(location: str) -> bool:
    """Whether a location is an http or https URL, in which ? and # have a meaning."""
    return location.startswith(("http://", "https://"))
