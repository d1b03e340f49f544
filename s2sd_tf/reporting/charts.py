"""Charts of a report, drawn by matplotlib as SVG that can be embedded in an HTML page."""

import io
import math
import xml.etree.ElementTree
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from s2sd_tf.evaluation.embeddings import Rows
from s2sd_tf.evaluation.metrics import RetrievalResult
from s2sd_tf.evaluation.rows import normalized, take
from s2sd_tf.evaluation.verification import VerificationResult

_COLORS = ("#1f5fa8", "#d1701f")
_FAINT, _LINE = "#666677", "#dde2e9"
# Number of random pairs in the histogram.
_PAIRS = 200_000
_SPEED = "queries_per_second"
_KINDS = ("same class", "different classes")


def recall_curve(result: RetrievalResult) -> str:
    """Draws recall@k over k and returns the SVG."""
    ranks = result.first_ranks[result.answerable]
    top = 2 ** math.ceil(math.log2(max(2, min(ranks.max(initial=1), 10_000))))
    ks = np.unique(np.round(np.geomspace(1, top, 60)).astype(int))
    figure, axes = _figure()
    axes.plot(ks, [np.mean((ranks > 0) & (ranks <= k)) for k in ks], color=_COLORS[0])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set(xlabel="k", xlim=(1, top), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _svg(figure, "recall over k")


def dimension_curves(found: Mapping[int, Mapping[str, Any]]) -> str:
    """Draws what `metrics_by_dim` returns, as `dimension_figure`, and returns the SVG."""
    return _svg(dimension_figure(found), "metrics over dimension")


def dimension_figure(found: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Draws every metric, and the queries per second, over dimension and bytes per item.

    Args:
        found: what `metrics_by_dim` returns.
    """
    dims = sorted(found)
    names = [name for name, value in found[dims[0]].items() if isinstance(value, float) and name != _SPEED]
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    for axes, columns in zip(figure.subplots(1, 2), (names, [_SPEED])):
        _style(axes)
        for color, name in zip(hues(len(columns)), columns):
            axes.plot(dims, [found[dim][name] for dim in dims], color=color, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(dims, [f"{dim}\n{found[dim]['bytes']:,} B" for dim in dims])
        axes.minorticks_off()
        axes.set(xlabel="dimension, and bytes per item", ylim=(0, None))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if columns == names:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.legend(frameon=False, fontsize=8, labelcolor=_FAINT)
        else:
            axes.set_ylabel("queries per second, exact search")
    return figure


def similarity_histogram(rows: Rows, labels: np.ndarray, generator: np.random.Generator) -> str:
    """Draws histograms of cosine similarities, for pairs of one class and of different classes; returns the SVG.

    Args:
        rows: float rows `(n, dim)`.
        labels: int64 `(n,)`.
        generator: draws the pairs.
    """
    found = {name: _similarities(rows, *pairs) for name, pairs in _pairs(labels, generator).items() if len(pairs[0])}
    low = min((values.min() for values in found.values()), default=-1.0)
    edges = np.linspace(max(-1.0, math.floor(10 * low) / 10), 1.0, 51)
    counts = [np.histogram(np.clip(values, edges[0], 1.0), edges)[0] for values in found.values()]
    return _svg(_histograms(dict(zip(found, counts)), edges)[0], "similarities of pairs")


def pair_histogram(result: VerificationResult) -> str:
    """Draws histograms of the similarities of all pairs, with the threshold of the best F1, and returns the SVG."""
    values = result.thresholds[1:]
    # A little more, so that there is a range if all similarities are equal.
    edges = np.linspace(values[-1], values[0] + 1e-6 * max(1.0, abs(values[-1])), 51)
    accepts = (result.true_accepts, result.false_accepts)
    counts = [np.histogram(values, edges, weights=np.diff(accepted))[0] for accepted in accepts]
    figure, axes = _histograms(dict(zip(_KINDS, counts)), edges)
    threshold = result.threshold()
    axes.axvline(threshold, color=_FAINT, linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set_xlabel("similarity")
    axes.legend(frameon=False, fontsize=8, labelcolor=_FAINT)
    return _svg(figure, "similarities of all pairs")


def roc_curve(result: VerificationResult) -> str:
    """Draws the true accept rate over the false accept rate, and returns the SVG."""
    # The rates at which classes were counted: few points, at all orders of magnitude.
    far, tar = (np.append(0.0, rates[result.counted]) for rates in (result.far, result.tar))
    least = 10.0 ** math.floor(math.log10(0.5 / result.false_accepts[-1]))
    figure, axes = _figure()
    axes.plot(np.maximum(far, least), tar, color=_COLORS[0], drawstyle="steps-post")
    axes.set_xscale("log")
    axes.set(xlabel="false accept rate", ylabel="true accept rate", xlim=(least, 1), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _svg(figure, "receiver operating characteristic")


def _histograms(found, edges):
    """`(figure, axes)` with a histogram for each name of `found`, of counts `(bins,)` as shares."""
    figure, axes = _figure()
    for color, (name, counts) in zip(_COLORS, found.items()):
        shares = counts / counts.sum()
        axes.stairs(shares, edges, fill=True, color=color, alpha=0.25)
        axes.stairs(shares, edges, color=color, label=name)
    axes.set(xlabel="cosine similarity", xlim=(edges[0], edges[-1]), ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    if found:
        axes.legend(frameon=False, fontsize=8, labelcolor=_FAINT)
    return figure, axes


def _pairs(labels, generator):
    """Positions of random pairs: dict from "same class" and "different classes" to `(one, other)`."""
    size = len(labels)
    order = np.argsort(labels, kind="stable")
    # Draw pairs of one class from runs of equal labels. Pairs drawn at random are nearly all of different classes.
    starts = np.searchsorted(labels[order], labels[order], "left")
    ends = np.searchsorted(labels[order], labels[order], "right")
    picks = generator.integers(0, size, _PAIRS)
    partner = starts[picks] + (generator.random(_PAIRS) * (ends - starts)[picks]).astype(int)
    same = partner != picks
    one, other = generator.integers(0, size, (2, _PAIRS))
    different = labels[one] != labels[other]
    return {
        _KINDS[0]: (order[picks[same]], order[partner[same]]),
        _KINDS[1]: (one[different], other[different]),
    }


def _similarities(rows, one, other, block=4096):
    """Cosine similarities of pairs of positions."""
    found = []
    for start in range(0, len(one), block):
        a, b = (normalized(take(rows, side[start : start + block])) for side in (one, other))
        found.append(np.einsum("ij,ij->i", a.astype(np.float64), b))
    return np.concatenate(found)


def _figure():
    figure = Figure(figsize=(4.6, 2.5), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes):
    axes.grid(color=_LINE)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=_FAINT, labelsize=8, length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=_FAINT, fontsize=8)


def hues(count: int) -> np.ndarray:
    """Colors that differ, RGB in [0, 1], float64 `(count, 3)`."""
    codes = np.arange(count)
    # Hues a golden angle apart, so that they differ for any number of colors.
    return hsv_to_rgb(np.stack([codes * 0.381966 % 1.0, np.full(count, 0.7), 0.85 - codes % 3 * 0.15], axis=1))


def _svg(figure, name):
    """Converts a figure to an SVG element that does not affect the page around it; equal figures give equal text.

    Args:
        figure: matplotlib `Figure`.
        name: what it shows, for screen readers.
    """
    figure.patch.set_visible(False)
    for artist in figure.findobj():
        artist.set_clip_on(False)
    FigureCanvasSVG(figure)
    written = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", metadata=nothing)
    root = xml.etree.ElementTree.fromstring(written.getvalue())
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
    for element in root.findall(".//style/.."):
        # It would apply to the whole page.
        for style in element.findall("style")[:1]:
            element.remove(style)
    # Remove ids that nothing refers to, as they would be the same in every figure. The others are digests.
    used = {value for element in root.iter() for key, value in element.attrib.items() if key == "href"}
    for element in root.iter():
        if "#" + element.attrib.get("id", "") not in used:
            element.attrib.pop("id", None)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": name}
    return xml.etree.ElementTree.tostring(root, encoding="unicode")


def _local(name):
    return name.split("}")[-1]
