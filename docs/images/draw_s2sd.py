"""Draws s2sd.png, the picture at the head of the README: `python docs/images/draw_s2sd.py`."""

import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, BASE, TARGET, FEATURE = "#2b2b2b", "#1f5fa8", "#d1701f", "#2e8b57"


def main():
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 36)
    axes.axis("off")

    def box(x, y, width, height, text, color, fill=0.10, size=9):
        style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.3,rounding_size=1", linewidth=1.4)
        style.set(edgecolor=color, facecolor=(*_rgb(color), fill))
        axes.add_patch(style)
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)

    def arrow(start, end, color=INK, style="-", label="", offset=(0, 1)):
        patch = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.4)
        patch.set_linestyle(style)
        axes.add_patch(patch)
        if label:
            x, y = (start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1]
            axes.text(x, y, label, fontsize=8, color=color, ha="center", va="center")

    box(1, 14, 9, 8, "batch of\nP classes\nx M images", INK, 0.03)
    box(16, 14, 10, 8, "backbone", INK, 0.03)
    box(32, 14, 10, 8, "pooled\nfeatures f", FEATURE)
    arrow((10.8, 18), (15.4, 18))
    arrow((26.8, 18), (31.4, 18))
    for y, dim in ((28, "512"), (20.5, "1024"), (13, "2048")):
        box(52, y, 14, 5.5, f"target head\nMLP to {dim} dim.", TARGET)
        arrow((42.8, 18), (51.4, y + 2.7), TARGET)
        box(78, y, 20, 5.5, "similarities $S(q_k)$\nobjective $L_k$", TARGET)
        arrow((66.8, y + 2.7), (77.4, y + 2.7), TARGET)
    box(52, 1, 14, 6, "base head\nlinear, 128 dim.", BASE, 0.2)
    arrow((42.8, 16), (51.4, 5), BASE)
    box(78, 1, 20, 6, "similarities $S(z)$\nobjective $L$", BASE, 0.2)
    arrow((66.8, 4), (77.4, 4), BASE)
    arrow((88, 12.4), (88, 7.8), TARGET, "--", "$w$ mean KL", (6, 0))
    arrow((37, 13.4), (77.4, 6.4), FEATURE, "--", "$w_f$ KL from $S(f)$, after a delay", (14, -0.1))
    axes.text(72, 0.2, "kept at test time", fontsize=8, color=BASE, ha="center", style="italic")
    FigureCanvasAgg(figure)
    figure.savefig(pathlib.Path(__file__).with_name("s2sd.png"), dpi=110)


def _rgb(color):
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


if __name__ == "__main__":
    main()
