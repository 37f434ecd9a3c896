"""Result files as tables and sentences, between markers in README.md and docs/performance.

A marker is ``<!-- results: NAME -->``, and all up to ``<!-- end -->`` is written anew. A test has it that nothing else
stands there than what the stored files give.
"""

import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.stored import RESULTS, ROOT, load, select
from benchmarks.timing import REHEARSAL_SECONDS

Row = dict[str, Any]
Stored = dict[str, dict[str, Any]]

PAGES = (
    "README.md",
    *(f"docs/performance/{name}.md" for name in ("index", "models", "operators", "scaling", "limits")),
)
PLOTS = Path("docs/performance/plots")
_MARKED = re.compile(r"(<!-- results: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OURS = ("fastnn", "fastnn frozen", "fused", "frozen", "fastnn layers", "training_step")
_OUR_LOOPS = ("training_step, DataLoader", "training_step, index", "epoch")
_TINY = 3  # of the models of benchmarks/cases.py, which come first
_WORDS = {"inference": "inference", "training": "forward and backward", "step": "training step"}
_DIRECTIONS = tuple(_WORDS)
_WIDTH = 120


# ---- figures -------------------------------------------------------------------------------------------------------


def time_text(microseconds: float) -> str:
    """Three digits, in the unit that fits."""
    size, unit = next(((size, unit) for size, unit in ((1e6, "s"), (1e3, "ms")) if microseconds >= size), (1, "µs"))
    value = microseconds / size
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x"


def best(row: Row, ours: bool) -> str:
    """The fastest of fastnn's forms, or of the others."""
    times = {name: time for name, time in row["microseconds"].items() if (name in (*_OURS, *_OUR_LOOPS)) == ours}
    return min(times, key=lambda name: times[name])


def against_best(row: Row) -> float:
    """How many times as fast as the fastest rival fastnn's fastest form is."""
    return row["microseconds"][best(row, False)] / row["microseconds"][best(row, True)]


def against_stock(row: Row) -> float:
    """The same against eager PyTorch, in its better memory format where both were measured."""
    times = row["microseconds"]
    stock = min(times[name] for name in ("stock", "stock, fused Adam", "eager", "channels_last") if name in times)
    return stock / times[best(row, True)]


def against_loop(row: Row) -> float:
    """How many times as fast an epoch is as stock's loop over a DataLoader."""
    return row["microseconds"]["stock, DataLoader"] / row["microseconds"]["epoch"]


def mean_text(ratios: Sequence[float]) -> str:
    """The geometric mean, with the least and the most."""
    if not ratios:
        return ""
    return f"**{ratio_text(statistics.geometric_mean(ratios))}** ({min(ratios):.2g} to {max(ratios):.2g})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(rows: Iterable[Row]) -> list[str]:
    """The contenders of the rows, in the order in which they come first."""
    return list(dict.fromkeys(name for row in rows for name in row["microseconds"]))


# ---- what stands between the markers -------------------------------------------------------------------------------


def where(stored: Stored) -> str:
    infos = [content["environment"] for content in stored.values()]
    info, date = stored["models"]["environment"], min(info["date"] for info in infos)
    seconds = [info["seconds_a_row"] for info in infos]
    text = (
        f"Measured on {info['processor']} ({info['instruction_set']}), with torch {info['torch']} and fastnn "
        f"{info['fastnn']} at commit {info['commit']}, {date}, for {min(seconds):g} to {max(seconds):g} seconds a row."
    )
    rehearsed = " **This was a rehearsal: no figure is to be believed.**" if min(seconds) < REHEARSAL_SECONDS else ""
    return textwrap.fill(text + rehearsed, _WIDTH)


def ratios(stored: Stored, name: str, direction: str, of: Callable[[Row], float] = against_stock) -> list[float]:
    """Of the file's rows on one thread."""
    return [of(row) for row in select(stored[name]["rows"], direction=direction, threads=1)]


def headline(stored: Stored) -> str:
    def mean(name: str, direction: str, count: int | None = None) -> str:
        return f"{statistics.geometric_mean(ratios(stored, name, direction)[:count]):.1f}"

    conv, rnn, mlp = (f"{ratio:.1f}" for ratio in ratios(stored, "models", "inference")[:_TINY])
    real = len(ratios(stored, "zoo", "inference"))
    loop = statistics.geometric_mean(ratios(stored, "epoch", "epoch", against_loop)[:_TINY])
    return textwrap.fill(
        f"**{mean('models', 'inference', _TINY)} times as fast as eager PyTorch**: the geometric mean of a tiny "
        f"convolutional network ({conv}), recurrent network ({rnn}) and autoencoder ({mlp}), in float32 inference on "
        f"one thread. Forward and backward are {mean('models', 'training', _TINY)} times as fast, a whole training "
        f"step in one call {mean('models', 'step', _TINY)} times, and a whole loop over data in memory {loop:.0f} "
        f"times. Larger models gain less: {real} real ones run {mean('zoo', 'inference')} times and train "
        f"{mean('zoo', 'training')} times as fast, in the geometric mean.",
        _WIDTH,
    )


def sizes(stored: Stored) -> str:
    """What tiny models get, beside what larger ones get."""

    def means(
        name: str, directions: Sequence[str], rows: slice, of: Callable[[Row], float] = against_stock
    ) -> list[str]:
        return [mean_text(ratios(stored, name, direction, of)[rows]) for direction in directions]

    def of_models(rows: slice) -> list[str]:
        passes, loops = means("models", _DIRECTIONS[:2], rows), means("epoch", ["epoch"], rows, against_loop)
        return [*passes, *loops, *means("frozen", ["inference"], rows, against_best)]

    def of_larger(name: str) -> list[str]:
        return means(name, _DIRECTIONS[:2], slice(None))

    real, layers = (len(ratios(stored, name, "inference")) for name in ("zoo", "layers"))
    best_of_zoo = means("zoo", ["inference"], slice(None), against_best)
    lines = [
        ["three tiny models", *of_models(slice(_TINY))],
        ["the same three at realistic sizes", *of_models(slice(_TINY, 2 * _TINY))],
        [f"{real} real models, LeNet-5 to ResNet-18", *of_larger("zoo"), "", *best_of_zoo],
        [f"{layers} convolution layers of published networks", *of_larger("layers"), "", ""],
    ]
    heads = [
        *(_WORDS[direction] for direction in _DIRECTIONS[:2]),
        "training loop, by `epoch`",
        "inference, against the best rival",
    ]
    return table(["one thread", *heads], lines)


def memory(stored: Stored) -> str:
    rows = stored["memory"]["rows"]
    heads = {"stock": "stock", "fastnn.fuse": "fused", "fastnn.training_step": "`training_step`"}
    lines = []
    for row in rows:
        cells = [
            f"{row['bytes'][name] / 1e6:.0f} MB, {time_text(row['microseconds'][name])}"
            if name in row["bytes"]
            else "-"
            for name in heads
        ]
        lines.append([row["case"], *cells])
    return table(["a training step of", *heads.values()], lines)


def models(stored: Stored) -> str:
    rows = []
    for row in stored["models"]["rows"]:
        low, high = row["ratio_quartiles"]
        times = row["microseconds"]
        ratio = ratio_text(row["ratio"]) if row["reliable"] else "worthless"
        cells = [row["case"], _WORDS[row["direction"]], str(row["threads"])]
        rows.append([*cells, time_text(times["stock"]), time_text(times["fused"]), ratio, f"{low:.2f} to {high:.2f}"])
    return table(["model (input)", "direction", "threads", "stock", "fused", "ratio", "middle half"], rows)


def rivals(name: str) -> Callable[[Stored], str]:
    """A table of ``benchmarks.compare``."""

    def rendered(stored: Stored) -> str:
        rows = stored[name]["rows"]
        contenders = columns(rows)
        heads = ["case", "direction", "threads", *contenders, "best rival / best of fastnn", "% of its bound"]
        lines = []
        for row in rows:
            times = [time_text(row["microseconds"][c]) if c in row["microseconds"] else "" for c in contenders]
            bound = f"{row['percent_of_bound']:.0f} ({row['bound']})"
            cells = [row["case"], row["direction"], str(row["threads"]), *times]
            lines.append([*cells, f"**{ratio_text(against_best(row))}**", bound])
        return table(heads, lines)

    return rendered


def zoo(stored: Stored) -> str:
    rows = stored["zoo"]["rows"]
    contenders = [name for name in columns(rows) if name != "stock"]
    lines = []
    for row in rows:
        times = row["microseconds"]
        cells = [ratio_text(times["stock"] / times[name]) if name in times else "" for name in contenders]
        lines.append([row["case"], row["direction"], str(row["threads"]), time_text(times["stock"]), *cells])
    return table(["model", "direction", "threads", "stock", *contenders], lines)


def step(stored: Stored) -> str:
    rows = stored["step"]["rows"]
    contenders = columns(rows)
    lines = []
    for row in rows:
        times = [time_text(row["microseconds"][c]) if c in row["microseconds"] else "" for c in contenders]
        lines.append([row["case"], str(row["threads"]), *times, f"**{ratio_text(against_stock(row))}**"])
    return table(["model (input)", "threads", *contenders, "better stock / training_step"], lines)


def epoch(stored: Stored) -> str:
    """A batch of each loop."""
    rows = stored["epoch"]["rows"]
    contenders = columns(rows)
    lines = []
    for row in rows:
        times = row["microseconds"]
        cells = [time_text(times[c] / row["batches"]) if c in times else "" for c in contenders]
        jax = ratio_text(times["jax scan"] / times["epoch"]) if "jax scan" in times else ""
        lines.append([row["case"], str(row["threads"]), *cells, f"**{ratio_text(against_loop(row))}**", jax])
    return table(["model (batch)", "threads", *contenders, "epoch, of stock over a DataLoader", "of jax scan"], lines)


def making(stored: Stored) -> str:
    """What it costs to train a small model more."""
    tiny = [row["making"] / 1e3 for row in select(stored["epoch"]["rows"], threads=1)[:_TINY]]
    return textwrap.fill(
        f"Two threads that each train an autoencoder make {stored['epoch']['threads_scale']:.2f} times as many epochs "
        f"as one. To make a step for a further model of a class, with its first call, takes {min(tiny):.1f} to "
        f"{max(tiny):.1f} ms with the three tiny models.",
        _WIDTH,
    )


def layers(stored: Stored) -> str:
    """A layer a line: against stock's better memory format, in each direction and number of threads."""
    rows = stored["layers"]["rows"]
    kinds = list(dict.fromkeys((row["direction"], row["threads"]) for row in rows))
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        of_layer = select(rows, case=name)
        ratios = [ratio_text(row["speedup"]) for row in of_layer]
        algorithm = next(row["algorithm"] for row in reversed(of_layer))
        lines.append([name, of_layer[0]["layer"], str(algorithm), *ratios])
    heads = [f"{direction}, {threads} thread{'s' * (threads > 1)}" for direction, threads in kinds]
    return table(["layer of", "input, channels, kernel, pool", "algorithms", *heads], lines)


def layer_means(stored: Stored) -> str:
    lines = []
    for name in ("layers", "layers_avx2"):
        rows = stored[name]["rows"]
        kernels = stored[name]["environment"]["instruction_set"]
        for direction, threads in dict.fromkeys((row["direction"], row["threads"]) for row in rows):
            ratios = [row["speedup"] for row in select(rows, direction=direction, threads=threads)]
            lines.append([kernels, direction, str(threads), mean_text(ratios)])
    return table(["instruction set", "direction", "threads", "geometric mean (least to most)"], lines)


def overhead(stored: Stored) -> str:
    targets, rows = stored["overhead"]["targets"], stored["overhead"]["rows"]
    contenders = columns(rows[1:])
    lines = []
    for row in rows:
        cells = [f"{row['microseconds'][c]:.1f}" if c in row["microseconds"] else "" for c in contenders]
        for name, most in targets.items():
            above = row["above"].get(name)
            text = "" if above is None else f"{above:.1f}"
            cells.append(f"**{text}**" if above is not None and above > most else text)
        lines.append([row["case"], *cells])
    return table(["op", *contenders, *(f"{name} (<= {most:g})" for name, most in targets.items())], lines)


_MEASURED_AGAINST_RIVALS = ("frozen", "conv_relu_max_pool", "rnn", "mlp", "zoo", "step", "epoch", "layers")


def losses(stored: Stored) -> str:
    """Every row of every file whose fastest rival is faster than fastnn's fastest form, the worst first."""
    rows = [row for name in _MEASURED_AGAINST_RIVALS for row in stored[name]["rows"]]
    lost = sorted((row for row in rows if against_best(row) < 1), key=against_best)
    lines = []
    for row in lost:
        ours, theirs = best(row, True), best(row, False)
        times = row["microseconds"]
        cells = [f"{against_best(row):.2f}", row["case"], row["direction"], str(row["threads"])]
        lines.append([*cells, f"{ours} {time_text(times[ours])}", f"{theirs} {time_text(times[theirs])}"])
    words = f"{len(lost)} of {len(rows)} measurements:\n\n"
    return words + table(["ratio", "case", "direction", "threads", "fastnn", "best rival"], lines)


BLOCKS: dict[str, Callable[[Stored], str]] = {
    "where": where,
    "headline": headline,
    "sizes": sizes,
    "memory": memory,
    "models": models,
    **{name: rivals(name) for name in ("frozen", "conv_relu_max_pool", "rnn", "mlp")},
    "zoo": zoo,
    "step": step,
    "epoch": epoch,
    "making": making,
    "layers": layers,
    "layer means": layer_means,
    "overhead": overhead,
    "losses": losses,
}


def rendered(page: str, stored: Stored) -> str:
    """The page's text with the stored results between its markers."""
    return _MARKED.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](stored)}\n{found[3]}", page)


def write_pages(root: Path) -> None:
    """Write the repository's pages, with the results of this folder, and the plots into it."""
    stored = load(root / RESULTS.relative_to(ROOT))
    for page in PAGES:
        file = root / page
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rendered((ROOT / page).read_text(), stored))
    plots.draw_all(stored, root / PLOTS)
