"""HTML pages that need no server, no network and no other file, from the parts in report.html."""

import base64
import functools
import hashlib
import html
import importlib.resources
import json
import os
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

from s2sd_tf.files import replacing
from s2sd_tf.reporting.embedded_images import EmbeddedImages
from s2sd_tf.reporting.pictures import data_uri, shortened

# The most characters of a name below a picture.
_NAME = 44


class Markup(str):
    """Text that is HTML already."""


def write_page(
    path: str | os.PathLike, title: str, about: str, sections: Iterable[str], scripts: Sequence[str] = ()
) -> None:
    """Writes a page, atomically.

    Args:
        path: file to write.
        title, about: heading, and the line below it.
        sections: what `section` returns.
        scripts: JavaScript to run after the page is there. The page's policy allows no other, by their digests.
    """
    # An element ends at the first end tag, wherever it is.
    scripts = [re.sub("<(?=/script|!--)", r"\\x3C", script, flags=re.IGNORECASE) for script in scripts]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    page = part(
        "page",
        title=title,
        about=about,
        policy=Markup("".join(f"'sha256-{digest}' " for digest in digests).strip() or "'none'"),
        sections=joined(sections),
        scripts=joined(part("script", text=Markup(script)) for script in scripts),
    )
    # Ids may be file names with bytes that are not UTF-8.
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page)


def own_script() -> str:
    """The script of this package's pages: tables that sort, and the map."""
    return importlib.resources.files(__package__).joinpath("report.js").read_text(encoding="utf-8")


def json_markup(value: Any) -> Markup:
    """A value as JSON that can stand in a `script` element of the type application/json."""
    return Markup(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def section(heading: str, text: str, content: str) -> Markup:
    """A section of a page. `content` is HTML."""
    return part("section", heading=heading, text=text, content=Markup(content))


def figure(
    images: EmbeddedImages, position: int, color: str, name: str, score: str = "", short: str | None = None
) -> Markup:
    """The picture of an image in a frame of the CSS color `color`, or its position if it has no picture.

    Args:
        images, position: the image.
        color: the color.
        name: what is below it, shortened if it is long; the whole is shown when the reader points at it.
        score: what comes before that, whole.
        short: what is below the picture instead of the name that is shortened by default.
    """
    pixels = images.image(position) if images.image is not None else None
    short = shortened(name, _NAME) if short is None else short
    found = {"id": images.id(position), "color": color, "name": name, "short": short, "score": score}
    if pixels is None:
        return part("no_image", **found, position=position)
    return part("image", **found, source=data_uri(pixels))


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
