"""Tables on the terminal."""

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def metrics_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table of retrieval metrics in percent.

    Args:
        rows: for each row's name, the metrics by name: floats in [0, 1], or `(mean, deviation)`. Other values (counts)
            are left out. All rows have the columns of the first.
    """
    first = next(iter(rows.values()))
    columns = [name for name, value in first.items() if isinstance(value, (float, tuple))]
    lines = [["", *columns]]
    lines += [[name, *(_percent(metrics[column]) for column in columns)] for name, metrics in rows.items()]
    return _aligned(lines)


def dims_table(rows: Mapping[int, Mapping[str, Any]]) -> str:
    """Returns a table of what `metrics_by_dim` returns: metrics in percent, bytes per item, queries per second."""
    columns = [name for name, value in next(iter(rows.values())).items() if isinstance(value, float)][:-1]
    lines = [["dimension", *columns, "bytes", "queries/s"]]
    for dim, found in rows.items():
        cost = [str(found["bytes"]), f"{found['queries_per_second']:,.0f}"]
        lines.append([str(dim), *(_percent(found[column]) for column in columns), *cost])
    return _aligned(lines)


def thresholds_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table of what `verification_metrics` or `open_set_metrics` computed, in percent, with the thresholds.

    Args:
        columns: for each column's name, the values by name. The threshold of `tar@0.1` is `threshold@0.1`.
    """
    first = next(iter(columns.values()))
    names = [name for name, value in first.items() if isinstance(value, float) and not name.startswith("threshold@")]
    lines = [["", *(cell for column in columns for cell in (column, "threshold"))]]
    for name in names:
        key = f"threshold@{name.split('@')[-1]}"
        cells = [(_percent(found[name]), f"{found[key]:.4f}" if key in found else "") for found in columns.values()]
        lines.append([name, *(text for pair in cells for text in pair)])
    return _aligned(lines)


def _aligned(lines):
    """Returns lines of cells as text in columns; the first line is the head."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def sections_table(sections: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Returns sections of `(name, value)` pairs as aligned lines under their titles."""
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = []
    for title, rows in sections.items():
        lines += ["", title, "-" * len(title), *(f"{name.ljust(width)}  {value}" for name, value in rows)]
    return "\n".join(lines[1:])


def embedding_summary(summary: Mapping[str, Any], folder: str) -> str:
    """Returns the content of an output folder's `summary.json` as text: what was embedded, and what was not."""
    lines = [f"{summary['embedded']:,} images, {summary['dim']} dimensions, {summary['shards']} shards: {folder}"]
    failed = summary["failed"]
    if failed:
        lines.append(f"{len(failed):,} images could not be read (all of them in {folder}/summary.json):")
        lines += [f"  {row['id']}: {row['error']}" for row in failed[:10]]
    return "\n".join(lines)


def registry_table(kind: str) -> str:
    """Returns the names to choose from ("objectives", "miners", "samplers", "backbones", "datasets"), one a line."""
    from s2sd_tf import mining, objectives
    from s2sd_tf.data import datasets, samplers
    from s2sd_tf.models import backbones

    def from_docstring(registry: Any) -> Callable[[str], str]:
        return lambda name: (inspect.getdoc(registry.lookup(name)) or "").split("\n\n", 1)[0]

    registries: dict[str, tuple[Any, Callable[[str], str]]] = {
        "objectives": (objectives, from_docstring(objectives)),
        "miners": (mining, from_docstring(mining)),
        "samplers": (samplers, from_docstring(samplers)),
        "backbones": (backbones, backbones.describe),
        "datasets": (datasets, datasets.describe),
    }
    registry, describe = registries[kind]
    width = max(map(len, registry.names()))
    return "\n".join(
        f"{name.ljust(width)}  {textwrap.shorten(describe(name), 118 - width, placeholder=' ...')}"
        for name in registry.names()
    )


def _percent(value):
    if isinstance(value, tuple):
        return f"{100 * value[0]:.1f} +- {100 * value[1]:.1f}"
    return f"{100 * value:.1f}"
