"""An evaluation as one HTML page that needs nothing else: no server, no network, no other file."""

import base64
import html
import io
import json
import math

import numpy as np
from PIL import Image

from s2sd_tf.checks import check_file_to_write
from s2sd_tf.evaluation.rows import normalized, take
from s2sd_tf.files import replacing
from s2sd_tf.reporting.pictures import RIGHT, WRONG, as_picture

_THUMBNAIL = 112
_LINES = ("#1f5fa8", "#d1701f", "#2e8b57", "#8e44ad")
# Points of the projection at most, and pairs whose distances are counted.
_POINTS, _PAIRS = 2000, 200_000

_STYLE = """
:root { --ink: #1c2430; --faint: #667; --line: #dde2e9; --paper: #fff; --ground: #f4f6f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 1.5rem; margin: .4rem 0 .2rem; } h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
p { margin: .3rem 0 .8rem; color: var(--faint); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 16px 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; }
.pair section { margin: 0; min-width: 0; } svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--faint); }
.query { display: flex; gap: 8px; overflow-x: auto; padding: 8px 0; border-bottom: 1px solid var(--line); }
figure { margin: 0; flex: 0 0 86px; font-size: 11px; line-height: 1.3; }
figure img, figure .none { width: 86px; height: 86px; object-fit: contain; border: 3px solid; border-radius: 6px; }
figure .none { display: flex; align-items: center; justify-content: center; background: var(--ground); }
figcaption { overflow-wrap: anywhere; }
.bars div { display: grid; grid-template-columns: minmax(80px, 30%) 1fr 64px; gap: 8px; align-items: center; }
.bars .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: 13px; }
.bars .bar { background: var(--ground); height: 12px; border-radius: 3px; display: block; }
.bars .bar i { display: block; height: 12px; border-radius: 3px; background: #1f5fa8; }
.bars .value { text-align: right; font-size: 13px; font-variant-numeric: tabular-nums; }
#map { position: relative; } #map canvas { width: 100%; aspect-ratio: 4 / 3; display: block; }
#tip { position: absolute; pointer-events: none; background: var(--ink); color: #fff; padding: 3px 8px; font-size: 12px;
  border-radius: 5px; display: none; max-width: 220px; overflow-wrap: anywhere; z-index: 1; }
"""

_SCRIPT = """
const points = JSON.parse(document.getElementById('points').textContent);
const canvas = document.querySelector('#map canvas'), tip = document.getElementById('tip');
let places = [];
function draw() {
  const width = canvas.clientWidth, height = canvas.clientHeight, scale = window.devicePixelRatio || 1;
  canvas.width = width * scale; canvas.height = height * scale;
  const context = canvas.getContext('2d'); context.scale(scale, scale);
  places = points.map(p => [14 + p[0] * (width - 28), 14 + p[1] * (height - 28)]);
  points.forEach((p, i) => {
    context.fillStyle = `hsl(${p[2] * 137.508 % 360} 65% ${42 + p[2] * 7 % 20}%)`;
    context.globalAlpha = 0.75; context.beginPath(); context.arc(...places[i], 3.2, 0, 7); context.fill();
  });
}
function look(event) {
  const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = -1, least = 144;
  places.forEach((p, i) => {
    const d = (p[0] - x) ** 2 + (p[1] - y) ** 2;
    if (d < least) { least = d; best = i; }
  });
  tip.style.display = best < 0 ? 'none' : 'block';
  if (best < 0) return;
  tip.textContent = points[best][3];
  tip.style.left = Math.max(0, Math.min(places[best][0] + 10, box.width - tip.offsetWidth)) + 'px';
  tip.style.top = (places[best][1] + 12) + 'px';
}
canvas.addEventListener('pointermove', look); canvas.addEventListener('pointerdown', look);
canvas.addEventListener('pointerleave', () => tip.style.display = 'none');
new ResizeObserver(draw).observe(canvas);
"""


def save_report(
    path,
    result,
    neighbors,
    embeddings,
    gallery_labels=None,
    gallery=None,
    class_names=None,
    ids=None,
    gallery_ids=None,
    image=None,
    gallery_image=None,
    title="Retrieval",
    about="",
    table=None,
    seed=0,
):
    """Writes the page: metrics with their intervals, recall over k, similarities of positives and negatives, the best,
    typical and worst queries with their neighbours, recall of every class, and a 2-D projection.

    Args:
        path: file to write, whole or not at all.
        result: `RetrievalResult`.
        neighbors: `Neighbors` of the queries, `(queries, k)`.
        embeddings: float array `(queries, dim)`.
        gallery_labels, gallery, gallery_ids, gallery_image: the same of the gallery as of the queries; None where the
            queries search among themselves.
        class_names: dict or sequence from label to str, or None for the numbers.
        ids: n str, or None.
        image: function from a query's position to an array `(h, w)` or `(h, w, c)`, uint8 or float up to 1, or None.
        title, about: str, heading and the line below it.
        table: dict from a column's name to a dict of metrics. Default: the result's.
        seed: int, of what is sampled.

    Raises:
        ValueError: a folder at `path`.
    """
    check_file_to_write("path", path)
    own = gallery is None
    if own:
        gallery, gallery_labels, gallery_ids, gallery_image = embeddings, result.labels, ids, image
    named = _names(class_names)
    generator = np.random.default_rng(seed)
    parts = [
        _section("Metrics", "In percent, with the 95% interval over classes (bootstrap).", _metrics(result, table)),
        '<div class="pair">',
        _section("Recall over k", "Share of queries with a positive among the k nearest.", _recall_curve(result)),
        _section(
            "Similarities",
            "Cosine similarity of pairs of one class and of different classes.",
            _histogram(embeddings, result.labels, generator),
        ),
        "</div>",
    ]
    for heading, text, chosen in _choose(result):
        shown = [
            _query(i, neighbors, result.labels, gallery_labels, named, ids, gallery_ids, image, gallery_image)
            for i in chosen
        ]
        parts.append(_section(heading, text, "".join(shown)))
    parts.append(_section("Classes", *_bars(result, named)))
    parts.append(_section("Map", *_map(embeddings, result.labels, named, ids, generator)))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>{''.join(parts)}</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
    # Ids may be file names that are not UTF-8; in JSON an escape is what they become.
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page)


def _section(heading, text, content):
    return f"<section><h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>{content}</section>"


def _metrics(result, table):
    intervals = result.confidence_intervals()
    table = table or {"": result.means()}
    first = next(iter(table.values()))
    names = [name for name, value in first.items() if isinstance(value, float)]
    lines = [
        "<tr><th>metric</th>" + "".join(f"<th>{html.escape(row)}</th>" for row in table) + "<th>interval</th></tr>"
    ]
    for name in names:
        cells = [f"<td>{_number(name, row.get(name))}</td>" for row in table.values()]
        low_high = " to ".join(_number(name, value) for value in intervals[name]) if name in intervals else ""
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}<td>{low_high}</td></tr>")
    told = f"{len(result.labels):,} queries, {int(np.sum(~result.answerable)):,} of them without a positive."
    return f'<div class="wide"><table>{"".join(lines)}</table></div><p>{told}</p>'


def _number(name, value):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    plain = name.split(" ")[-1] in ("intra", "inter", "ratio", "rho")
    return f"{value:.3f}" if plain else f"{100 * value:.1f}"


def _recall_curve(result):
    ranks = result.first_ranks[result.answerable]
    top = int(2 ** math.ceil(math.log2(max(2, min(ranks.max(initial=1), 10_000)))))
    ks = np.unique(np.round(np.geomspace(1, top, 60)).astype(int))
    values = [np.mean((ranks > 0) & (ranks <= k)) for k in ks]
    ticks = [2**power for power in range(0, int(math.log2(top)) + 1, max(1, int(math.log2(top)) // 7))]
    return _plot(
        np.log2(ks),
        {"recall": values},
        [(math.log2(k), str(k)) for k in ticks],
        [(v / 4, f"{25 * v}%") for v in range(5)],
    )


def _histogram(embeddings, labels, generator):
    size = len(labels)
    order = np.argsort(labels, kind="stable")
    # Neighbours in the order of labels are the pairs of one class; any two are nearly all of different ones.
    starts = np.searchsorted(labels[order], labels[order], "left")
    ends = np.searchsorted(labels[order], labels[order], "right")
    picks = generator.integers(0, size, _PAIRS)
    partner = starts[picks] + (generator.random(_PAIRS) * (ends - starts)[picks]).astype(int)
    same = partner != picks
    pairs = {"same class": (order[picks[same]], order[partner[same]])}
    one, other = generator.integers(0, size, (2, _PAIRS))
    different = labels[one] != labels[other]
    pairs["different classes"] = (one[different], other[different])
    found = {name: _similarities(embeddings, a, b) for name, (a, b) in pairs.items() if len(a)}
    low = min((values.min() for values in found.values()), default=-1.0)
    edges = np.linspace(max(-1.0, math.floor(10 * low) / 10), 1.0, 51)
    curves = {}
    for name, values in found.items():
        curves[name] = np.histogram(np.clip(values, edges[0], 1.0), edges)[0] / len(values)
    highest = max((curve.max() for curve in curves.values()), default=1.0)
    middle = (edges[1:] + edges[:-1]) / 2
    ticks = [(v, f"{v:.1f}") for v in np.linspace(edges[0], 1.0, 5)]
    return _plot(middle, {name: curve / highest for name, curve in curves.items()}, ticks, [], filled=True)


def _similarities(embeddings, one, other, block=4096):
    """Cosine similarities of pairs of positions."""
    parts = []
    for start in range(0, len(one), block):
        a, b = (normalized(take(embeddings, side[start : start + block])) for side in (one, other))
        parts.append(np.einsum("ij,ij->i", a.astype(np.float64), b))
    return np.concatenate(parts)


def _plot(x, curves, x_ticks, y_ticks, filled=False):
    """SVG of curves with values in [0, 1]."""
    left, right, top, bottom = 44, 440, 26, 210
    low, high = float(min(x)), float(max(x))

    def place(a, b):
        across = left + (right - left) * (float(a) - low) / max(high - low, 1e-9)
        return f"{across:.1f},{bottom - (bottom - top) * float(b):.1f}"

    parts = [f'<svg viewBox="0 0 460 240" role="img" aria-label="{html.escape(", ".join(curves))}">']
    for value, text in y_ticks:
        across, down = place(low, value).split(",")
        parts.append(f'<line x1="{across}" x2="{right}" y1="{down}" y2="{down}" stroke="#dde2e9"/>')
        parts.append(f'<text x="{left - 6}" y="{down}" dy="4" text-anchor="end">{text}</text>')
    for value, text in x_ticks:
        across = place(value, 0).split(",")[0]
        parts.append(f'<text x="{across}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    for number, (color, (name, values)) in enumerate(zip(_LINES, curves.items())):
        points = " ".join(place(a, b) for a, b in zip(x, values))
        if filled:
            around = f"{place(x[0], 0)} {points} {place(x[-1], 0)}"
            parts.append(f'<polygon points="{around}" fill="{color}" fill-opacity=".25"/>')
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        if len(curves) > 1:
            parts.append(f'<text x="{left + 150 * number}" y="14" style="fill:{color}">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"


def _choose(result, count=5):
    """`(heading, text, positions)` of the queries to show."""
    there = np.flatnonzero(result.answerable)
    # Among equally good ones those with more positives tell more.
    quality = result.values["map@r"][there]
    order = there[np.lexsort((there, result.positives[there], quality))]
    middle = order[np.searchsorted(np.sort(quality), np.median(quality)) :]
    middle = middle[: max(1, count)]
    return [
        ("Best queries", "Highest MAP@R. Green: same class; red: another.", order[::-1][:count]),
        ("Typical queries", "MAP@R at the median.", middle),
        ("Worst queries", "Lowest MAP@R.", order[:count]),
    ]


def _query(query, neighbors, labels, gallery_labels, named, ids, gallery_ids, image, gallery_image):
    cells = [_figure(image, query, "#1c2430", f"query: {named(labels[query])}", ids)]
    for item, similarity in zip(neighbors.indices[query], neighbors.similarities[query]):
        if item >= 0:
            color = RIGHT if gallery_labels[item] == labels[query] else WRONG
            text = f"{similarity:.3f} {named(gallery_labels[item])}"
            cells.append(_figure(gallery_image, int(item), color, text, gallery_ids))
    return f'<div class="query">{"".join(cells)}</div>'


def _figure(image, position, color, caption, ids):
    caption = html.escape(caption)
    title = html.escape(str(ids[position]) if ids is not None else f"position {position}")
    source = thumbnail(image(position)) if image is not None else None
    if source:
        shown = f'<img src="{source}" alt="{caption}" style="border-color:{color}">'
    else:
        shown = f'<div class="none" style="border-color:{color}">{html.escape(str(position))}</div>'
    return f'<figure title="{title}">{shown}<figcaption>{caption}</figcaption></figure>'


def thumbnail(pixels):
    """A data URI of an image `(h, w)` or `(h, w, c)`, uint8 or float up to 1; None for None."""
    if pixels is None:
        return None
    picture = as_picture(pixels)
    small = max(picture.size) < _THUMBNAIL
    scale = _THUMBNAIL / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "PNG" if small else "JPEG"
    (picture if small else picture.convert("RGB")).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _bars(result, named, most=40):
    classes, counts, means = result.per_class()
    name = next(iter(means))
    values = means[name]
    order = np.lexsort((classes, values))
    text = f"{name} of every class, the worst first, with the number of queries."
    if len(order) > most:
        order = np.concatenate([order[: most // 2], order[-(most // 2) :]])
        text = f"{name} of the {most // 2} worst and the {most // 2} best of {len(classes):,} classes."
    lines = []
    for position in order:
        percent = 100 * values[position]
        label = html.escape(f"{named(classes[position])} ({counts[position]})")
        lines.append(
            f'<div><span class="name" title="{label}">{label}</span>'
            f'<span class="bar"><i style="width:{percent:.1f}%"></i></span>'
            f'<span class="value">{percent:.1f}</span></div>'
        )
    return text, f'<div class="bars">{"".join(lines)}</div>'


def _map(embeddings, labels, named, ids, generator):
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    size = len(labels)
    chosen = np.sort(generator.choice(size, min(size, _POINTS), replace=False))
    rows = normalized(take(embeddings, chosen))
    # t-SNE has no answer where all are equal.
    apart = len(chosen) >= 10 and rows.shape[1] > 2 and rows.std(axis=0).max() > 1e-6
    kind = "t-SNE" if apart else "principal components"
    if kind == "t-SNE":
        perplexity = min(30.0, (len(chosen) - 1) / 3)
        flat = TSNE(2, perplexity=perplexity, init="pca", random_state=0, metric="cosine").fit_transform(rows)
    else:
        flat = PCA(min(2, *rows.shape)).fit_transform(rows)
        flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    flat = np.nan_to_num(flat)
    low, high = flat.min(axis=0), flat.max(axis=0)
    flat = (flat - low) / np.maximum(high - low, 1e-9)
    codes = np.unique(labels[chosen], return_inverse=True)[1]
    points = [
        [
            round(float(x), 4),
            round(float(y), 4),
            int(code),
            named(labels[i]) + (f" · {ids[i]}" if ids is not None else ""),
        ]
        for (x, y), code, i in zip(flat, codes, chosen)
    ]
    # As a script's content: nothing in it may end the script.
    text = json.dumps(points, ensure_ascii=False).replace("<", "\\u003c")
    told = f"{len(chosen):,} of {size:,} embeddings by {kind}; the color is the class. Point at one to see what it is."
    return told, (
        f'<div id="map"><canvas></canvas><div id="tip"></div></div><script type="application/json" id="points">{text}'
        "</script>"
    )


def _names(class_names):
    if class_names is None:
        return lambda label: str(int(label))
    return lambda label: str(class_names[int(label)])
