"""Extension of griffe: makes the docstrings of this package readable as Google-style Markdown.

The docstrings stay as they are; what the site shows differs in three ways. A description that begins with ">= 1" is not
a quotation. "Example:" is a section of code. "height, width: int" describes two parameters.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

ENTRY = re.compile(r"( *)(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = "\n".join(rewritten(obj.docstring.value.splitlines()))


def rewritten(lines: list[str]) -> Iterator[str]:
    """Yields the lines of a docstring as the site needs them."""
    section = ""
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line and not line.startswith(" "):
            section = line
            yield "Examples:" if line == "Example:" else line
            continue
        entry = ENTRY.fullmatch(line) if section in ("Args:", "Attributes:") else None
        if not entry:
            yield unquoted(line) if section != "Example:" else line
            continue
        indent, names, text = entry.groups()
        more = []
        while at < len(lines) and lines[at].startswith(f"{indent}    "):
            more.append(unquoted(lines[at]))
            at += 1
        for name in names.split(", "):
            yield f"{indent}{name}: {unquoted(text)}"
            yield from more


def unquoted(line: str) -> str:
    """The line with an escaped ">" at its begin."""
    return re.sub(r"^( *)>", r"\1\\>", line)
