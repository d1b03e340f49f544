"""The map of a report: embeddings in two dimensions, to zoom into, search, filter, and follow to their neighbours."""

import base64
import io
import math
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image
from threadpoolctl import threadpool_limits

from s2sd_tf.evaluation.metrics import RetrievalResult
from s2sd_tf.evaluation.neighbors import Neighbors
from s2sd_tf.evaluation.rows import normalized, take
from s2sd_tf.process_settings import one_thread
from s2sd_tf.reporting.charts import hues
from s2sd_tf.reporting.embedded_images import EmbeddedImages
from s2sd_tf.reporting.page import Markup, json_markup, part
from s2sd_tf.reporting.pictures import fitted, shortened

# The most points, the least of a class before other classes are left out, and the neighbours of each that are shown.
_POINTS, _OF_CLASS, _NEAR = 3000, 20, 8
# The most pictures, of points and of their neighbours, and the side of each. The side is a multiple of the blocks of
# a JPEG, so that pictures do not run into each other.
_PICTURES, _SIDE = 6000, 48
# The size of the file with all pictures, and the quality it is written with: the first that makes it small enough.
_BYTES, _QUALITIES = 5_000_000, (80, 60, 40, 20, 8)
# The longest text of an id, and of the name of a class.
_ID, _NAME = 120, 200


class EmbeddingMap(NamedTuple):
    """A map, and what the rest of the page says about it.

    Attributes:
        text: how many embeddings it shows, and how.
        content: HTML of the map.
        codes: dict from the label of every class of its points to the number of the class on the page.
    """

    text: str
    content: Markup
    codes: dict[int, int]


def embedding_map(
    result: RetrievalResult,
    neighbors: Neighbors,
    queries: EmbeddedImages,
    gallery: EmbeddedImages,
    generator: np.random.Generator,
) -> EmbeddingMap:
    """Makes the map of the queries.

    Args:
        result, neighbors, queries, gallery: see `save_report`; they fit each other. The gallery may be the queries.
        generator: chooses the points if there are more than 3,000: up to 20 of each class, or more of few classes; if
            these are still too many, those of some of the classes.
    """
    points = _sampled(queries.labels, generator)
    flat, method = _flat(normalized(take(queries.rows, points)))
    # What the map knows: the points, and then those neighbours that are no points.
    items = [(queries, position) for position in points.tolist()]
    known = {position: item for item, position in enumerate(points.tolist())} if gallery is queries else {}
    near, similarities = [], []
    for row, values in zip(neighbors.indices[points, :_NEAR].tolist(), neighbors.similarities[points, :_NEAR].tolist()):
        there = [(position, value) for position, value in zip(row, values) if position >= 0]
        for position, _ in there:
            if known.setdefault(position, len(items)) == len(items):
                items.append((gallery, position))
        near.append([known[position] for position, _ in there])
        similarities.append([round(value, 3) for _, value in there])
    codes: dict[int, int] = {}
    classes = [codes.setdefault(int(images.labels[position]), len(codes)) for images, position in items]
    names = dict(zip(classes, (images.name(images.labels[position]) for images, position in items)))
    sheet, cells = _sheet(items, near)
    shown = len(set(classes[: len(points)]))
    found = {
        **dict(zip("xy", np.round(flat.astype(np.float64), 3).T.tolist())),
        "near": near,
        "similarities": similarities,
        "quality": [_percent(value) for value in result.values["map@r"][points].tolist()],
        "classes": classes,
        "ids": [_text(images.id(position), _ID) for images, position in items],
        "cells": cells,
        "side": _SIDE,
        "names": [_text(names[code], _NAME) for code in range(len(codes))],
        "colors": [to_hex(color) for color in hues(shown)],
    }
    return EmbeddingMap(
        _described(len(points), len(queries.labels), shown, len(np.unique(queries.labels)), method),
        part("map", data=json_markup(found), sheet=part("sheet", source=sheet) if sheet else Markup("")),
        {label: code for label, code in codes.items() if code < shown},
    )


def _sampled(labels, generator):
    """Positions of the points, ascending: some of every class, or all of some classes, as neighbours are of a class."""
    if len(labels) <= _POINTS:
        return np.arange(len(labels))
    order = generator.permutation(len(labels))
    codes = np.unique(labels, return_inverse=True)[1]
    # By class, in random order, and images of a class in random order.
    rank = generator.permutation(codes.max() + 1)[codes][order]
    order, rank = order[np.argsort(rank, kind="stable")], np.sort(rank)
    within = np.arange(len(rank)) - np.searchsorted(rank, rank)
    most = max(_OF_CLASS, _POINTS // (codes.max() + 1))
    return np.sort(order[within < most][:_POINTS])


def _described(points, images, classes, all_classes, method):
    if points == images:
        return f"All {images:,} embeddings of {classes:,} classes, by {method}."
    share = f"{classes:,}" if classes == all_classes else f"{classes:,} of {all_classes:,}"
    return (
        f"A sample: {points:,} of {images:,} embeddings, of {share} classes, chosen at random, by {method}. "
        "Neighbours are searched among all."
    )


def _sheet(items, near):
    """`(source, cells)`: one picture of all items as a `data:` URI, None if there is none, and the place of each in it,
    -1 for none.
    """
    points = len(near)
    # The first neighbours of all points come before the second.
    wanted = [*range(points), *sorted(range(points, len(items)), key=_first_rank(near).__getitem__)][:_PICTURES]
    cells = [-1] * len(items)
    pictures: list[Image.Image] = []
    for item in wanted:
        images, position = items[item]
        pixels = None if images.image is None else images.image(position)
        if pixels is not None:
            cells[item] = len(pictures)
            pictures.append(fitted(pixels, _SIDE)[0])
    if not pictures:
        return None, cells
    across = math.ceil(math.sqrt(len(pictures)))
    gray = all(picture.mode == "L" for picture in pictures)
    sheet = Image.new("L" if gray else "RGB", (across * _SIDE, math.ceil(len(pictures) / across) * _SIDE), "white")
    for cell, picture in enumerate(pictures):
        left, top = ((_SIDE - length) // 2 for length in picture.size)
        sheet.paste(picture, (cell % across * _SIDE + left, cell // across * _SIDE + top))
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= _BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", cells


def _first_rank(near):
    ranks: dict[int, int] = {}
    for row in near:
        for rank, item in enumerate(row):
            ranks[item] = min(rank, ranks.get(item, rank))
    return ranks


def _flat(rows):
    """Projects unit rows to two dimensions: `(points, method)`, an array `(n, 2)` and the name of the method."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    # t-SNE is undefined if all rows are equal.
    if len(rows) >= 10 and rows.shape[1] > 2 and rows.std(axis=0).max() > 1e-6:
        perplexity = min(30.0, (len(rows) - 1) / 3)
        # Threads wait for each other a thousand times. On a busy machine they wait many times longer than they work.
        with one_thread(), threadpool_limits(1, user_api="openmp"):
            flat = TSNE(2, perplexity=perplexity, init="pca", random_state=0, metric="cosine").fit_transform(rows)
        return np.nan_to_num(flat), "t-SNE"
    flat = PCA(min(2, *rows.shape)).fit_transform(rows)
    return np.nan_to_num(np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))), "principal components"


def _percent(value):
    return None if math.isnan(value) else round(100 * value, 1)


def _text(text, length):
    # Names of files may have bytes that are not UTF-8.
    return shortened(text, length).encode(errors="backslashreplace").decode()
