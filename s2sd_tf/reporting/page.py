"""HTML pages that need no server, no network, no script and no other file, from the parts in report.html."""

import functools
import html
import importlib.resources
import os
import re
import string
from collections.abc import Iterable
from typing import Any

from s2sd_tf.files import replacing
from s2sd_tf.reporting.embedded_images import EmbeddedImages
from s2sd_tf.reporting.pictures import data_uri


class Markup(str):
    """Text that is HTML already."""


def write_page(path: str | os.PathLike, title: str, about: str, sections: Iterable[str]) -> None:
    """Writes a page, atomically.

    Args:
        path: file to write.
        title, about: heading, and the line below it.
        sections: what `section` returns.
    """
    page = part("page", title=title, about=about, sections=joined(sections))
    # Ids may be file names with bytes that are not UTF-8.
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page)


def section(heading: str, text: str, content: str) -> Markup:
    """A section of a page. `content` is HTML."""
    return part("section", heading=heading, text=text, content=Markup(content))


def figure(images: EmbeddedImages, position: int, color: str, caption: str) -> Markup:
    """The picture of an image in a frame of the CSS color `color`, or its position if it has no picture."""
    name = images.ids[position] if images.ids is not None else f"position {position}"
    pixels = images.image(position) if images.image is not None else None
    if pixels is None:
        return part("no_image", id=name, color=color, position=position, caption=caption)
    return part("image", id=name, color=color, source=data_uri(pixels), caption=caption)


def part(name: str, /, **values: Any) -> Markup:
    """Fills a part of the template. Values that are not `Markup` are escaped."""
    values = {key: value if isinstance(value, Markup) else html.escape(str(value)) for key, value in values.items()}
    return Markup(_template()[name].substitute(values))


def joined(parts: Iterable[str]) -> Markup:
    """Parts one after another."""
    return Markup("".join(parts))


@functools.cache
def _template():
    """The parts of `report.html` by name."""
    text = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    pieces = re.split(r"^<!-- part: (\w+) -->\n", text, flags=re.MULTILINE)[1:]
    return {name: string.Template(part) for name, part in zip(pieces[::2], pieces[1::2])}
