"""Tables on the terminal."""


def metrics_table(rows):
    """A table of retrieval metrics in percent.

    Args:
        rows: dict from a row's name to a dict from metric to a float in [0, 1], or to `(mean, deviation)`. Metrics that
            are no floats (counts) are left out; all rows have the columns of the first.

    Returns:
        str of aligned lines.
    """
    first = next(iter(rows.values()))
    columns = [name for name, value in first.items() if isinstance(value, (float, tuple))]
    lines = [["", *columns]]
    lines += [[name, *(_percent(metrics[column]) for column in columns)] for name, metrics in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns) + 1)]
    text = [
        "  ".join(cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def sections_table(sections):
    """Sections of `(name, value)` as aligned lines of text under their titles.

    Args:
        sections: dict from title to a list of pairs of str.
    """
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = []
    for title, rows in sections.items():
        lines += ["", title, "-" * len(title), *(f"{name.ljust(width)}  {value}" for name, value in rows)]
    return "\n".join(lines[1:])


def embedding_summary(summary, folder):
    """What was embedded into `folder` and what was not, from its `summary.json`, as text."""
    lines = [f"{summary['embedded']:,} images, {summary['dim']} dimensions, {summary['shards']} shards: {folder}"]
    failed = summary["failed"]
    if failed:
        lines.append(f"{len(failed):,} images could not be read (all of them in {folder}/summary.json):")
        lines += [f"  {row['id']}: {row['error']}" for row in failed[:10]]
    return "\n".join(lines)


def _percent(value):
    if isinstance(value, tuple):
        return f"{100 * value[0]:.1f} +- {100 * value[1]:.1f}"
    return f"{100 * value:.1f}"
