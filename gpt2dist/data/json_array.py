"""The elements of a file that is one JSON array, one after the other, without parsing what lies in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

BLOCK_BYTES = 1 << 18
_STRUCTURE = re.compile(rb'["\[\]{},]')
_WHITE = re.compile(rb"\s*")
_IN_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


def is_array(f: Any) -> bool:
    """Whether the first byte that is not white space is `[`; a byte order mark does not count."""
    head = b""
    while not head and (data := f.read1(BLOCK_BYTES)):
        head = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"[")


def elements(f: Any, limit: int) -> Iterator[tuple[bytes, str]]:
    """(text of the element, problem) of each element; after a problem nothing follows.

    Holds one element at a time, and of one over `limit` bytes only its first `limit` + 1.
    """
    buffer = bytearray()
    start = at = depth = count = 0  # the element begins at `start`; what is before `at` was looked at
    quoted = ended = False
    while data := f.read1(BLOCK_BYTES):
        start = _WHITE.match(buffer, start, at).end()  # type: ignore[union-attr]  # it would pass for the beginning
        del buffer[start + limit + 1 : at], buffer[:start]
        start, at = 0, min(at - start, limit + 1)
        buffer += data
        while not ended:
            if quoted:
                at = _IN_STRING.match(buffer, at).end()  # type: ignore[union-attr]
                if buffer[at : at + 1] != b'"':  # the block ends inside the string
                    break
                quoted, at = False, at + 1
            match = _STRUCTURE.search(buffer, at)
            at = match.end() if match else len(buffer)
            if not match:
                break
            sign = match[0]
            quoted = sign == b'"'
            depth += (sign in b"[{") - (sign in b"]}")
            if depth == 1 and sign == b"[":
                start = at
            ended = depth == 0 and sign in b"]}"
            if ended or (depth == 1 and sign == b","):
                element = bytes(buffer[start : at - 1])
                start, count = at, count + 1
                if sign == b"}":
                    yield element, "a bracket closes that did not open"
                    return
                if element.strip() or count > 1 or not ended:  # [] has no element
                    yield element, ""
        if ended and buffer[start:].strip():
            yield bytes(buffer[start : start + limit]), "the array has ended before"
            return
    if not ended:
        yield bytes(buffer[start:]), "the array does not end"


def is_balanced(text: bytes) -> bool:
    """Whether each bracket closes one of its kind and each string ends: then the element ends where it seems to."""
    opened = bytearray()
    at = 0
    while match := _STRUCTURE.search(text, at):
        at, sign = match.end(), match[0]
        if sign == b'"':
            at = _IN_STRING.match(text, at).end() + 1  # type: ignore[union-attr]
            if at > len(text):
                return False
        elif sign in b"[{":
            opened += sign
        elif sign in b"]}" and (not opened or bytes([opened.pop()]) + sign not in (b"[]", b"{}")):
            return False
    return not opened
