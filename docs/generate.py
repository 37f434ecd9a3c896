"""What the pages include: tables that ask the code, drawings, and pages with the measured figures.

`write` puts all of it into a folder, of which nothing is edited by hand.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from drawings import DRAWINGS
from taken import ENTRIES, MODELS

from fastnn import activations, backend_info, testing, training_numbers
from fastnn._extension import load_extension
from fastnn._torch import OpOverload
from fastnn.graph import aten_layers, understood
from fastnn.network_program import KINDS
from fastnn.recurrent_modes import MODES

# ---- tables ---------------------------------------------------------------------------------------------------------


def table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def code(words: Iterable[Any]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def models() -> str:
    torch.manual_seed(0)
    rows = ([name, *(ask(row) for ask in ENTRIES.values())] for name, row in MODELS.items())
    return table(["layers", *ENTRIES], rows)


def names_of_activations() -> str:
    functions: dict[str, set[str]] = {}
    for function, name, _ in activations.functions():
        functions.setdefault(name, set()).add(function if isinstance(function, str) else function.__name__)
    rows = []
    for name in activations.NAMES:
        one = activations.parse_one(name)
        settings = dict(zip(one.kind.parameters, one.parameters, strict=True))
        words = sorted(functions.get(activations._NAMES[name].name, ()))
        rows.append(
            [f"`{name}`", f"`{one.module()}`", code(words), code(f"{key}={value:g}" for key, value in settings.items())]
        )
    return table(["name", "module of `torch.nn`", "functions and methods", "parameters"], rows)


def losses() -> str:
    entries = {entry.name: entry for entry in training_numbers._LOSSES}
    rows = []
    for module, name in training_numbers._MODULES.items():
        entry = entries.get(name, entries["cross_entropy"])  # nll_loss behind log_softmax is cross_entropy
        number = f"`{entry.number}`, {entry.default:g} by default" if entry.number and name in entries else ""
        before = "" if name in entries else "only behind `log_softmax`"
        rows.append(
            [f"`{module.__name__}`", f"`F.{name}`", number, f"`{entry.weight}`" if entry.weight else "", before]
        )
    return table(["module", "function", "number", "tensor of weights", ""], rows)


def optimizers() -> str:
    rows = []
    for kind, entry in training_numbers.OPTIMIZERS.items():
        states = [f"`{name}`" + (f" if `{setting}`" if setting else "") for name, setting in entry.states]
        numbers = code(name for name, _ in entry.numbers)
        rows.append([f"`{kind.__name__}`", code(entry.group_settings), ", ".join(filter(None, [numbers, *states]))])
    return table(
        ["optimizer of `torch.optim`", "settings that may change at any step", "what it keeps of a parameter"], rows
    )


def recurrent_modes() -> str:
    rows = ([f"`{mode.name}`", mode.gates, mode.states, mode.saved] for mode in MODES)
    return table(["mode", "gates", "states", "numbers that a step saves for backward, of each hidden unit"], rows)


def algorithms(direction: str) -> str:
    rows = ([f"`{name}`", words] for name, words in load_extension().conv_algorithms()[direction].items())
    return table(["algorithm", "what it is for, in the words of `explain`"], rows)


def tolerances() -> str:
    rows = (
        [f"`{str(dtype).removeprefix('torch.')}`", f"{one.ratio:g} times stock's", f"{one.floor:.1e}", one.reason]
        for dtype, one in testing.TOLERANCES.items()
    )
    return table(["dtype", "error at most", "plus this part of the largest number", "why there is such a part"], rows)


def operators() -> str:
    info = backend_info()
    names = dict.fromkeys((*info.cpu_operators, *info.cuda_operators))
    places = (info.cpu_operators, info.cuda_operators)
    return table(
        ["operator", "CPU", "GPU"], ([f"`{n}`", *("yes" if n in place else "" for place in places)] for n in names)
    )


def network_layers() -> str:
    """The layers of networks, with their inputs and attributes."""
    rows = (
        [
            f"`{kind.name}`",
            code(kind.inputs),
            code(name if default is None else f"{name}={default}" for name, (_, default) in kind.attributes.items()),
        ]
        for kind in KINDS.values()
    )
    return table(["layer", 'inputs ("?": may be missing, "*": any number)', "attributes, with their defaults"], rows)


def frozen_operators() -> str:
    """The operators of an exported model that are layers of a network."""
    rows: dict[str, list[str]] = {}
    for target, read in aten_layers.ROWS.items():
        rows.setdefault(read.__name__.strip("_").replace("_", " "), []).append(_operator_name(target))
    return table(
        ["read as", "operators of the exported graph"], ([name, code(sorted(set(rows[name])))] for name in rows)
    )


def _operator_name(target: Any) -> str:
    return str(target) if isinstance(target, OpOverload) else target.__name__


# What a forward may do that ends its trace. The reasons are those of the code.
UNTRACED = (
    "try: x = f(x)\n except ValueError: pass",
    "global calls; calls = 1",
    "return x is y",
    "match x:\n  case [first, *rest]: return first",
    "import math",
    "return f.__globals__",
)


def untraced() -> str:
    rows = []
    for source in UNTRACED:
        defined: dict[str, Any] = {}
        exec(f"def forward(x, y):\n {source}", defined)
        why = understood.why_not_run(defined["forward"].__code__)
        assert why is not None, source
        rows.append([code(source.splitlines()[:1]), code(why[:1])])
    return table(["a line of the forward", "what `explain` says"], rows)


def understood_calls() -> str:
    pure = sorted({f.__name__ for f in understood.PURE_FUNCTIONS if f.__module__ not in ("math", "_operator")})
    not_pure = sorted(f.__name__ for f in understood._NOT_PURE if f is not None)
    classes = sorted({kind.__name__ for kind in understood.PURE_CLASSES})
    rows = [
        ["Python's own functions", code(pure)],
        ["functions of `math`", "all"],
        ["functions of `operator`", f"all but {code(not_pure)}"],
        ["classes", code(classes)],
        ["functions of torch that make a tensor", code(understood._FACTORIES)],
        ["functions that tell of a mode, asked again at each call", code(understood._MODES)],
        ["functions of torch that act on tensors, and methods of tensors", "all but those of the next row"],
        ["methods that end the trace", code(sorted(understood.WRITERS))],
    ]
    return table(["what", "which"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "models": models,
    "activations": names_of_activations,
    "losses": losses,
    "optimizers": optimizers,
    "recurrent_modes": recurrent_modes,
    "forward_algorithms": lambda: algorithms("forward"),
    "backward_algorithms": lambda: algorithms("backward"),
    "tolerances": tolerances,
    "operators": operators,
    "frozen_operators": frozen_operators,
    "network_layers": network_layers,
    "untraced": untraced,
    "understood": understood_calls,
}

# ---- pages of figures -----------------------------------------------------------------------------------------------

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


class Subject(NamedTuple):
    """A page of figures: its title, how they are made, and the files of benchmarks/results that it shows."""

    title: str
    how: str
    files: Sequence[str]  # patterns


SUBJECTS = {
    "gpu": Subject(
        "The GPU, without one",
        "Nothing here was timed on a card: `make gpu-check` compiles the kernels, `make gpu-roofline` predicts.",
        ["gpu_*"],
    ),
    "others": Subject(
        "Beside other programs", "`make bench-processes` and `benchmarks.lightning_loop` measure them.", ["*"]
    ),
}


def pages_of_results(folder: Path) -> dict[str, str]:
    """The text of each page, by its file's name. A file is on the first page that has a pattern for it, and a page
    without files is left out. What `make results` measures, in `.json`, is in the pages of docs/performance."""
    left = sorted(path.name for path in folder.iterdir() if path.suffix in (".md", ".txt", ".png", ".svg"))
    pages = {}
    for name, subject in SUBJECTS.items():
        files = [file for file in left if any(fnmatch.fnmatch(file, pattern) for pattern in subject.files)]
        left = [file for file in left if file not in files]
        if files:
            shown = "\n".join(f"## `{file}`\n\n{_shown(folder / file)}\n" for file in files)
            pages[f"{name}.md"] = (
                f"# {subject.title}\n\n{subject.how} The files are those of `benchmarks/results`.\n\n{shown}"
            )
    return pages


def _shown(path: Path) -> str:
    if path.suffix in (".png", ".svg"):
        return f"![{path.stem}]({path.name})"
    text = path.read_text()
    if path.suffix == ".txt":
        return f"```text\n{text}```"
    text = re.sub(r"^(#+ )", r"##\1", text, flags=re.MULTILINE)  # below the page's own headings
    return re.sub(r"(?<=[^|\n])\n\|", "\n\n|", text)  # a table right below a paragraph would be part of it


# ---- all of it ------------------------------------------------------------------------------------------------------


def write(folder: Path) -> None:
    """Writes everything into the folder. What has not changed is left alone, so that Sphinx need not read it again."""
    pages = pages_of_results(RESULTS)
    pictures = {path.name: path.read_bytes() for path in RESULTS.iterdir() if path.suffix in (".png", ".svg")}
    contents: dict[str, bytes] = {
        **{f"tables/{name}.md": make().encode() for name, make in TABLES.items()},
        **{f"drawings/{name}.svg": draw().encode() for name, draw in DRAWINGS.items()},
        **{f"performance/{name}": text.encode() for name, text in pages.items()},
        **{f"performance/{name}": picture for name, picture in pictures.items()},
    }
    for old in (path for path in folder.rglob("*") if path.is_file()):
        if str(old.relative_to(folder)) not in contents:
            old.unlink()
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
