"""Pictures of results: curves over epochs, and queries with their neighbours."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from s2sd_tf.checks import check_file_to_write
from s2sd_tf.files import local_path, replacing

QUERY, RIGHT, WRONG = "#1c2430", "#2e8b57", "#c0392b"
_CURVES = ("#1f5fa8", "#d1701f", "#2e8b57", "#8e44ad", "#7f8c8d", "#c0392b")


def save_curves(path: str | os.PathLike, panels: Mapping[str, Mapping[str, Sequence]]) -> None:
    """Writes a PNG of line plots side by side.

    Args:
        path: file to write.
        panels: maps the title of a panel to its curves, and the label of a curve to `(x, y)` or `(x, y, deviation)`,
            sequences of equal length. A deviation is drawn as a band.
    """
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for position, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), position + 1)
        for color, (label, curve) in zip(_cycle(len(curves)), curves.items()):
            x, y = np.asarray(curve[0], float), np.asarray(curve[1], float)
            axes.plot(x, y, label=label, color=color, linewidth=1.8, marker="o" if len(x) < 12 else None, markersize=4)
            if len(curve) > 2:
                band = np.asarray(curve[2], float)
                axes.fill_between(x, y - band, y + band, color=color, alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    save_figure(path, figure)


def save_gallery(
    path: str | os.PathLike,
    images: Mapping[int, np.ndarray],
    rows: np.ndarray,
    names: Sequence[str],
    title: str = "",
) -> None:
    """Writes a PNG with one query per row and its nearest neighbours, framed green (same class) or red.

    Args:
        path: file to write.
        images: arrays `(height, width)` or `(height, width, channels)` by position, of any sizes. Their common range
            of values is scaled to [0, 1].
        rows: integer array `(queries, 1 + k)` of positions, the query first; -1 for none.
        names: class name of every position.
        title: title above the picture.
    """
    low = min(float(np.min(image)) for image in images.values())
    high = max(float(np.max(image)) for image in images.values())
    cells = []
    for items in rows.tolist():
        line: list[tuple | None] = []
        for column, item in enumerate(items):
            if item < 0:
                line.append(None)
                continue
            right = names[item] == names[items[0]]
            color = "black" if column == 0 else RIGHT if right else WRONG
            mark = "query: " if column == 0 else "" if right else "\u2717 "
            caption = mark + shortened(names[item], 12 if column == 0 else 16)
            pixels = (images[item] - low) / max(high - low, 1e-12)
            line.append((pixels, caption, color, 1 if column == 0 else 3))
        cells.append(line)
    _save_grid(path, cells, title)


def save_matches(
    path: str | os.PathLike, rows: Sequence[Sequence[tuple[np.ndarray | None, str, float | None]]]
) -> None:
    """Writes a PNG with one query per row and its matches. Long names are shortened, similarities are not.

    Args:
        path: file to write.
        rows: rows of `(image, name, similarity)`, the query first. An image is a float array `(h, w)` or `(h, w, c)` in
            [0, 1], or None for a blank; the similarity of the query is None.
    """

    def cell(column, image, name, similarity):
        caption = shortened(name, 20) if similarity is None else f"{similarity:.3f}\n{shortened(name, 20)}"
        return np.ones((8, 8)) if image is None else image, caption, "black", 2 if column == 0 else 0.5

    _save_grid(path, [[cell(column, *match) for column, match in enumerate(row)] for row in rows])


def _save_grid(path, cells, title=""):
    """Writes a PNG of images in rows. A cell is `(image, caption, color, width of the frame)`, or None."""
    columns = max(len(line) for line in cells)
    figure = Figure(figsize=(1.25 * columns, 1.4 * len(cells) + 0.5), layout="constrained")
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            if cell is None:
                continue
            image, caption, color, width = cell
            axes = figure.add_subplot(len(cells), columns, row * columns + column + 1)
            axes.imshow(_without_channel(image), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(color=color, linewidth=width)
            # Names with dollar signs are not formulas.
            axes.set_title(_printable(caption), fontsize=7, color=color, pad=4, parse_math=False)
    if title:
        figure.suptitle(title, fontsize=10)
    save_figure(path, figure)


def choose_queries(labels: np.ndarray, neighbors: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Chooses queries to show, of different classes if there are enough, half of them with wrong neighbours.

    Args:
        labels: integer array: the labels of the queries, followed by those of other positions in `neighbors`.
        neighbors: integer array `(queries, k)` of positions; -1 for none.
        count: number of queries to choose.
        seed: int >= 0.

    Returns:
        Positions of `count` queries, in ascending order of their number of wrong neighbours.
    """
    wrong = np.sum((labels[np.maximum(neighbors, 0)] != labels[: len(neighbors), None]) & (neighbors >= 0), axis=1)
    order = np.random.default_rng(seed).permutation(len(neighbors))
    faulty = of_different_classes(order[wrong[order] > 0], labels, count // 2)
    others = np.setdiff1d(order, faulty, assume_unique=True)
    clean = np.concatenate([others[wrong[others] == 0], others[wrong[others] > 0]])
    chosen = np.concatenate([of_different_classes(clean, labels, count - len(faulty), labels[faulty]), faulty])
    return chosen[np.argsort(wrong[chosen], kind="stable")]


def of_different_classes(
    positions: np.ndarray, labels: np.ndarray, count: int, shown: Sequence[int] | np.ndarray = ()
) -> np.ndarray:
    """The first `count` of `positions` that are of different classes; then others, if there are too few classes.

    Args:
        positions: integer array of positions in `labels`, the best first.
        labels: integer array `(n,)`.
        count: number of positions to choose; fewer if there are fewer.
        shown: labels of classes that are taken last.
    """
    new = positions[~np.isin(labels[positions], shown)]
    new = new[np.sort(np.unique(labels[new], return_index=True)[1])]
    return np.concatenate([new, positions[~np.isin(positions, new)]])[:count]


def as_picture(pixels: Any) -> Image.Image:
    """Converts an array `(h, w)` or `(h, w, c)`, uint8 or float in [0, 1], to a PIL image."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        pixels = np.round(255 * np.clip(pixels, 0.0, 1.0)).astype(np.uint8)
    return Image.fromarray(_without_channel(pixels))


def thumbnail(pixels: Any, side: int) -> Image.Image:
    """Converts an image, as in `as_picture`, and reduces its longer side to at most `side` pixels."""
    picture = as_picture(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def fitted(pixels: Any, side: int) -> tuple[Image.Image, bool]:
    """Converts an image, as in `as_picture`, and resizes its longer side to `side` pixels.

    Returns:
        `(picture, small)`: whether the image was smaller than that, in which case its pixels become squares.
    """
    picture = as_picture(pixels)
    small = max(picture.size) < side
    size = [max(1, round(length * side / max(picture.size))) for length in picture.size]
    return picture.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS), small


def data_uri(pixels: Any, side: int = 112) -> str:
    """Converts an image, as in `as_picture`, to a `data:` URI. Its longer side is resized to `side` pixels."""
    picture, small = fitted(pixels, side)
    buffer = io.BytesIO()
    kind = "PNG" if small else "JPEG"
    (picture if small else picture.convert("RGB")).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def save_figure(path: str | os.PathLike, figure: Figure) -> None:
    """Writes a matplotlib figure as PNG, atomically."""
    path = local_path("path", path)
    check_file_to_write("path", path)
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _without_channel(image):
    """A grayscale image `(h, w, 1)` as `(h, w)`; others as they are."""
    image = np.asarray(image)
    return image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image


def _cycle(count):
    return [_CURVES[k % len(_CURVES)] for k in range(count)]


def _printable(text):
    # Bytes of file names that are not UTF-8 cannot be drawn as characters.
    return text.encode(errors="backslashreplace").decode()


def shortened(name: str, length: int) -> str:
    """A name of at most `length` characters: a longer one loses its middle, as names differ at either end."""
    if len(name) <= length:
        return name
    end = length // 2
    return f"{name[: length - 1 - end]}\u2026{name[-end:]}"
