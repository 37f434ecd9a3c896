"""Plots of the result files, each in a light and a dark variant of the width at which a page shows it."""

import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.stored import select

Stored = dict[str, dict[str, Any]]
Row = dict[str, Any]

_WIDTH = 8.6  # inches: 826 pixels of a page, so that a point of type is a point there
_NAMES = ("page", "text", "line", "stock", "ours", "ours on two threads", "compile", "onnxruntime")
THEMES = {
    theme: dict(zip(_NAMES, colors.split(), strict=True))
    for theme, colors in {
        "light": "#ffffff #1f2328 #c4ccd4 #6a737d #c4530f #ee9a5f #0b68c9 #1a7f37",
        "dark": "#0d1117 #e6edf3 #3d444d #9aa4ae #ff8f40 #a8561f #58a6ff #3fb950",
    }.items()
}
Colors = dict[str, str]


def _log_axis(axis: Any, ticks: list[float]) -> None:
    """An axis with these ticks alone, as plain numbers."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def models(stored: Stored, colors: Colors) -> Figure:
    """A panel a direction, a bar a case and number of threads, as long as its speed-up."""
    rows = stored["models"]["rows"]
    names = list(dict.fromkeys(row["case"] for row in rows))
    counts = sorted({row["threads"] for row in rows})
    titles = {"inference": "inference", "training": "forward and backward", "step": "training step in one call"}
    figure, panels = plt.subplots(1, 3, figsize=(_WIDTH, 1.3 + 0.5 * len(names)), sharey=True, layout="constrained")
    height = 0.8 / len(counts)
    for panel, (direction, title) in zip(panels, titles.items(), strict=True):
        for i, count in enumerate(counts):
            chosen = select(rows, direction=direction, threads=count)
            places = [names.index(row["case"]) + (i - (len(counts) - 1) / 2) * height for row in chosen]
            ratios = [row["ratio"] if row["reliable"] else 0 for row in chosen]
            label = f"{count} thread" + "s" * (count > 1)
            bars = panel.barh(places, ratios, height, color=colors[("ours", "ours on two threads")[i % 2]], label=label)
            texts = [f"{row['ratio']:.1f}" if row["reliable"] else "worthless" for row in chosen]
            over_the_line = {"facecolor": colors["page"], "edgecolor": "none", "pad": 0.5}
            panel.bar_label(bars, texts, padding=3, fontsize=8.5, color=colors["text"], bbox=over_the_line)
        panel.axvline(1, color=colors["text"], linewidth=1, zorder=0.5)
        panel.set_title(title, fontsize=10)
        panel.margins(x=0.22)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel("times as fast as eager PyTorch (the line is at 1)", fontsize=9.5, color=colors["text"])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(counts))
    return figure


def zoo(stored: Stored, colors: Colors) -> Figure:
    """A panel a direction, a row a model, a mark a contender."""
    rows = select(stored["zoo"]["rows"], threads=1)
    names = list(dict.fromkeys(row["case"] for row in rows))
    marks = {
        "better of fused and frozen": (("fused", "frozen"), "o", "ours"),
        "torch.compile": (("compile",), "|", "compile"),
        "better of ONNX Runtime and OpenVINO": (("onnxruntime", "openvino"), "x", "onnxruntime"),
    }
    figure, panels = plt.subplots(
        1, 2, figsize=(_WIDTH, 1.3 + 0.23 * len(names)), sharex=True, sharey=True, layout="constrained"
    )
    for panel, direction in zip(panels, ("inference", "training"), strict=True):
        of_direction = select(rows, direction=direction)
        for label, (contenders, marker, color) in marks.items():
            points = []
            for row in of_direction:
                times = [row["microseconds"][name] for name in contenders if name in row["microseconds"]]
                if times:
                    points.append((row["microseconds"]["stock"] / min(times), names.index(row["case"])))
            size = 34 if marker == "o" else 46
            panel.scatter(
                *zip(*points, strict=True), size, colors[color], marker, label=label, zorder=3
            ) if points else None
        panel.axvline(1, color=colors["text"], linewidth=1, zorder=0.5)
        panel.set_xscale("log")
        _log_axis(panel.xaxis, [0.5, 1, 2, 4, 8])
        panel.set_title({"training": "forward and backward"}.get(direction, direction), fontsize=10)
        panel.grid(axis="y", color=colors["line"], linewidth=0.5)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel("times as fast as eager PyTorch (the line is at 1)", fontsize=9.5, color=colors["text"])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def curves(stored: Stored, colors: Colors) -> Figure:
    """A panel a task, a curve for stock's loop and one for `epoch`."""
    rows = stored["curves"]["rows"]
    figure, panels = plt.subplots(1, len(rows), figsize=(_WIDTH, 3.0), layout="constrained")
    for panel, row in zip(panels, rows, strict=True):
        labels = {"stock, DataLoader": "stock's loop over a DataLoader", "epoch": "step.epoch of fastnn"}
        for (name, label), color in zip(labels.items(), ("stock", "ours"), strict=True):
            panel.plot(row["seconds"][name], row["losses"][name], color=colors[color], label=label)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(row["case"], fontsize=9)
        panel.set_xlabel(f"seconds ({len(row['losses']['epoch'])} epochs)")
        panel.grid(color=colors["line"], linewidth=0.4)
    panels[0].set_ylabel("mean loss of an epoch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def roofline(stored: Stored, colors: Colors) -> Figure:
    """What each case reaches, under the multipliers' peak and the bandwidths of caches and memory."""
    ops = {
        "conv_relu_max_pool": ("o", "ours"),
        "rnn": ("s", "compile"),
        "mlp": ("^", "onnxruntime"),
        "frozen": ("D", "stock"),
    }
    labels = {"frozen": "whole models"}
    figure, panel = plt.subplots(figsize=(_WIDTH, 4.6), layout="constrained")
    for op, (marker, color) in ops.items():
        rows = select(stored[op]["rows"], direction="inference", threads=1)
        seconds = [
            min(row["microseconds"][name] for name in row["microseconds"] if "fastnn" in name) / 1e6 for row in rows
        ]
        intensities = [row["operations"] / row["bytes_of_inference"] for row in rows]
        reached = [row["operations"] / second / 1e9 for row, second in zip(rows, seconds, strict=True)]
        panel.scatter(intensities, reached, 30, colors[color], marker, label=labels.get(op, op), zorder=3)
    peak = statistics.median(stored[op]["peak"]["1"] for op in ops) / 1e9
    panel.set_xscale("log")
    panel.set_yscale("log")
    left, right = panel.get_xlim()
    low, high = panel.get_ylim()
    panel.axhline(peak, color=colors["stock"], linewidth=1)
    panel.text(
        right, 1.06 * peak, f"multiply-adds, {peak:.0f} GFLOP/s ", ha="right", fontsize=8.5, color=colors["text"]
    )
    for megabytes, style in zip(stored["mlp"]["bandwidth"], ("-", "--", ":"), strict=True):
        rate = statistics.median(stored[op]["bandwidth"][megabytes] for op in ops) / 1e9
        label = f"read from {megabytes} MB, {rate:.0f} GB/s"
        panel.plot([low / rate, peak / rate], [low, peak], style, color=colors["stock"], linewidth=1, label=label)
    panel.set_xlim(min(left, 0.2), right)
    panel.set_ylim(low, max(high, 1.6 * peak))
    panel.set_xlabel("operations a byte that must move at least")
    panel.set_ylabel("GFLOP/s")
    panel.grid(color=colors["line"], linewidth=0.4)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def _times(panel: Any, rows: list[Row], colors: Colors) -> None:
    """Lines over sizes: stock's better format and fastnn, in both directions."""
    for direction, style in (("inference", "-"), ("training", "--")):
        of_direction = select(rows, direction=direction)
        sizes = [row["size"] for row in of_direction]
        times = [row["microseconds"] for row in of_direction]
        stock = [min(time for name, time in one.items() if name != "fastnn") / 1e3 for one in times]
        ours = [one["fastnn"] / 1e3 for one in times]
        label = {"training": "forward and backward"}.get(direction, direction)
        panel.plot(sizes, stock, style, color=colors["stock"], marker="o", markersize=3.5, label=f"stock, {label}")
        panel.plot(sizes, ours, style, color=colors["ours"], marker="o", markersize=3.5, label=f"fastnn, {label}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(color=colors["line"], linewidth=0.4)


def _scaling(panels_of: Callable[[list[Row]], list[tuple[str, str, list[Row]]]]) -> Callable[[Stored, Colors], Figure]:
    """A panel for each title, label and rows."""

    def draw(stored: Stored, colors: Colors) -> Figure:
        wanted = panels_of(stored["scaling"]["rows"])
        figure, panels = plt.subplots(1, len(wanted), figsize=(_WIDTH, 3.5), layout="constrained")
        for panel, (title, label, rows) in zip(panels, wanted, strict=True):
            _times(panel, rows, colors)
            sizes = sorted({row["size"] for row in rows})
            _log_axis(panel.xaxis, sizes if len(sizes) <= 6 else sizes[::2])
            panel.set_title(title, fontsize=9)
            panel.set_xlabel(label)
        panels[0].set_ylabel("milliseconds")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return figure

    return draw


def _lines(sweep: str) -> Callable[[list[Row]], list[tuple[str, str, list[Row]]]]:
    def panels_of(rows: list[Row]) -> list[tuple[str, str, list[Row]]]:
        rows = select(rows, sweep=sweep)
        return [(line, sweep, select(rows, line=line)) for line in dict.fromkeys(row["line"] for row in rows)]

    return panels_of


def _sweeps(*sweeps: str) -> Callable[[list[Row]], list[tuple[str, str, list[Row]]]]:
    return lambda rows: [panel for sweep in sweeps for panel in _lines(sweep)(rows)]


@dataclass(frozen=True)
class Plot:
    draw: Callable[[Stored, Colors], Figure]
    files: tuple[str, ...]  # whose figures it shows
    says: str  # to those who cannot see it


PLOTS = {
    "models": Plot(
        models, ("models",), "How many times as fast as eager PyTorch the three models are, at two sizes each"
    ),
    "curves": Plot(
        curves, ("curves",), "Loss over time on real data: stock's loop over a DataLoader, and step.epoch of fastnn"
    ),
    "zoo": Plot(zoo, ("zoo",), "How many times as fast as eager PyTorch real models are, beside other engines"),
    "roofline": Plot(
        roofline, ("conv_relu_max_pool", "rnn", "mlp", "frozen"), "GFLOP/s of every case under the processor's roofline"
    ),
    "batch": Plot(
        _scaling(_lines("batch")), ("scaling",), "Time against batch size, stock and fastnn, of three models"
    ),
    "sizes": Plot(
        _scaling(_sweeps("length", "channels", "hidden size")),
        ("scaling",),
        "Time against sequence length, channels and hidden size, stock and fastnn",
    ),
    "threads": Plot(
        _scaling(_lines("threads")), ("scaling",), "Time against threads, stock and fastnn, of three models"
    ),
}


def digest(name: str, stored: Stored) -> str:
    """Of the rows that a plot shows: it stands in the plot, and a test compares it with that of the stored rows."""
    rows = [stored[file]["rows"] for file in PLOTS[name].files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def draw_all(stored: Stored, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for theme, colors in THEMES.items():
        style = {
            "svg.hashsalt": "fastnn",
            "font.size": 9,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": colors["stock"],
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), colors["page"]),
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colors["text"]),
        }
        for name, plot in PLOTS.items():
            with plt.rc_context(style):
                figure = plot.draw(stored, colors)
                marks = {"Date": None, "Description": f"results {digest(name, stored)}"}
                figure.savefig(folder / f"{name}-{theme}.svg", metadata=marks)
                plt.close(figure)
