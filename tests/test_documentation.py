"""Every Python block of README.md and of docs/ runs, the reference names all that is public, and what the pages take
from the code, from results and from the Makefile is there. `make docs` builds the pages themselves."""

import fnmatch
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

import fastnn
from fastnn import activations
from fastnn.__main__ import main
from fastnn.graph.matcher import _MODULES as READ_BY_THE_MATCHER
from fastnn.graph.matcher import RECURRENT, layer_forward

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import drawings  # noqa: E402
import generate  # noqa: E402
import taken  # noqa: E402

README = ROOT / "README.md"
PAGES = [README, *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_generated" not in path.parts)]
ELSEWHERE = "docs/integrations.md"  # whose blocks tests/integrations runs
TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}


class Block(NamedTuple):
    """A block of code: Python that is run; with a file's name for a title, a file; with the title "run", a command."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def is_file(self) -> bool:
        return "." in self.title and " " not in self.title

    @property
    def runs(self) -> bool:
        return self.is_file or self.title == "run" or (self.language == "python" and not self.title)

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BLOCKS = [
    Block(page, text.count("\n", 0, found.start()) + 2, *found.groups(""))
    for page, text in TEXT.items()
    if page != ELSEWHERE
    for found in FENCE.finditer(text)
]


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.runs}))
def test_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page share their names, but those of the README, which people copy one by one."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in (block for block in BLOCKS if block.page == page and block.runs):
        if block.is_file:
            Path(block.title).write_text(block.text)
        elif block.language == "sh":
            run_command(block.text)
        else:
            code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec")
            exec(code, {"__name__": "page"} if page == "README.md" else names)
            printed = capsys.readouterr().out
            for sizes in re.findall(r"^print\(.*\.shape\)  # \((.*)\)$", block.text, re.MULTILINE):
                assert f"[{sizes}]" in printed


def run_command(command: str) -> None:
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "fastnn"]:  # in this process, which has imported torch already
        assert main(words[3:]) == 0
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    given = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["sh", "-ec", command], env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.runs], ids=lambda block: block.name)
def test_what_is_not_run(block: Block) -> None:
    """Python that is not run says why; the rest is listed (pytest -rs)."""
    reason = block.title.removeprefix("not run: ") if block.language == "python" else f"it is {block.language}"
    assert reason
    assert reason != block.title
    pytest.skip(reason)


def test_some_blocks_run_on_every_page_that_has_python() -> None:
    assert len([block for block in BLOCKS if block.runs]) > 20
    assert {block.page for block in BLOCKS if block.language == "python"} == {b.page for b in BLOCKS if b.runs}
    fences = sum(text.count("```python") for page, text in TEXT.items() if page != ELSEWHERE)
    assert fences == len([block for block in BLOCKS if block.language == "python"])  # none has another form


def test_files_are_used_by_a_command_behind_them() -> None:
    for block in (block for block in BLOCKS if block.is_file):
        later = [one.text for one in BLOCKS if one.page == block.page and one.title == "run" and one.line > block.line]
        assert any(block.title in text for text in later), block.name


def test_make_has_what_the_pages_name() -> None:
    makefiles = "".join(path.read_text() for path in (ROOT / "Makefile", *ROOT.glob("*.mk")))
    targets = set(re.findall(r"^([a-z0-9-]+):", makefiles, re.MULTILINE))
    for page, text in TEXT.items():
        named = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.MULTILINE))
        assert named <= targets, page


# ---- the reference --------------------------------------------------------------------------------------------------


def documented() -> list[str]:
    """The full names of everything that the reference describes."""
    names, module = [], ""
    for page, text in TEXT.items():
        if page.startswith("docs/api/"):
            for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)", text, re.MULTILINE):
                if kind == "currentmodule":
                    module = name
                else:
                    names.append(name if kind == "automodule" else f"{module}.{name}")
    return names


def test_the_reference_has_everything_public_and_nothing_else() -> None:
    functions = [name for name, one in vars(fastnn.functional).items() if is_own(one, "fastnn.ops")]
    models = [name for name, one in vars(fastnn.models).items() if is_own(one, "fastnn.models")]
    public = {
        *(f"fastnn.{name}" for name in fastnn.__all__),
        *(f"fastnn.nn.{kind.__name__}" for kind in fastnn.nn.FUSED),
        *(f"fastnn.functional.{name}" for name in functions),
        *(f"fastnn.models.{name}" for name in models),
    }
    found = documented()
    assert len(functions) >= 7
    assert len(models) >= 3
    assert sorted(public) == sorted(found)
    for name in found:
        assert pkgutil.resolve_name(name).__doc__, name


def is_own(value: Any, module: str) -> bool:
    return str(getattr(value, "__module__", "")).startswith(module)


# ---- what is generated ----------------------------------------------------------------------------------------------


def test_pages_include_all_tables_and_drawings_and_no_others() -> None:
    text = "".join(TEXT.values())
    assert set(re.findall(r"_generated/tables/(\w+)\.md", text)) == generate.TABLES.keys()
    assert set(re.findall(r"_generated/drawings/(\w+)\.svg", text)) == drawings.DRAWINGS.keys()


@pytest.mark.parametrize("name", [name for name in generate.TABLES if name != "models"])
def test_tables(name: str) -> None:
    heading, line, *rows = generate.TABLES[name]().splitlines()
    assert set(line) <= set("|- ")
    assert len(rows) >= 4
    columns = len(re.findall(r"(?<!\\)\|", heading))
    assert all(len(re.findall(r"(?<!\\)\|", row)) == columns for row in rows)


def test_rows_of_the_code_are_in_the_tables() -> None:
    assert all(f"`{name}`" in generate.TABLES["activations"]() for name in activations.NAMES)
    losses, optimizers = generate.TABLES["losses"](), generate.TABLES["optimizers"]()
    assert all(f"`F.{name}`" in losses for name in (row[0] for row in fastnn._C.losses()))
    assert all(f"`{name}`" in optimizers for name in (row[0] for row in fastnn._C.optimizers()))
    assert "`AdamW`" in optimizers


def test_every_kind_of_layer_that_is_read_is_in_a_row() -> None:
    forwards = {layer_forward(module) for row in taken.MODELS.values() for module in row.make().modules()}
    shown = {READ_BY_THE_MATCHER[forward][0] for forward in forwards if forward in READ_BY_THE_MATCHER}
    ours = {"block", "linear_relu", "identity"}  # fastnn's own layers, and what does nothing
    assert {kind for kind, *_ in READ_BY_THE_MATCHER.values()} - ours - set(activations.TORCH_NAMES) <= shown
    assert set(RECURRENT) <= forwards


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("Conv2d, ReLU, MaxPool2d", ["`conv_relu_max_pool`", "one call", "one call", "`conv_relu_max_pool`"]),
        ("a residual block of Conv2d and ReLU", ["`conv_relu_max_pool` and torch's own", "one call"]),
        ("MultiheadAttention", ["torch's own"]),
        ("ConvTranspose2d, ReLU", ["torch's own", "one call", "one call", "torch's own"]),
        ("Conv2d with weight_norm, ReLU", ["`conv_relu_max_pool`", "one call", "one call"]),
        ("Conv2d with spectral_norm, ReLU", ["torch's own", "one call", "the ordinary way"]),
    ],
)
def test_what_entries_make_of_a_model(name: str, answers: list[str]) -> None:
    for ask, answer in zip(taken.ENTRIES.values(), answers, strict=False):
        assert ask(taken.MODELS[name]) == answer


def test_what_a_forward_may_not_do() -> None:
    assert "it catches exceptions" in generate.untraced()
    assert "it imports a module" in generate.untraced()


def test_each_file_of_results_is_on_one_page(tmp_path: Path) -> None:
    for name in ("gpu_check.md", "gpu_new.txt", "a_new_one.md", "rnn.json"):
        (tmp_path / name).write_text("# heading\nwords\n| a |\n|---|\n| 1 |\n")
    for folder in (tmp_path, generate.RESULTS):
        pages = generate.pages_of_results(folder)
        shown = re.findall(r"^## `(.*)`$", "".join(pages.values()), re.MULTILINE)
        assert sorted(shown) == sorted(path.name for path in folder.iterdir() if path.suffix != ".json")
    pages = generate.pages_of_results(tmp_path)
    assert set(pages) == {"gpu.md", "others.md"}
    assert "### heading\nwords\n\n| a |" in pages["gpu.md"]


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawings_keep_to_their_frame(name: str) -> None:
    root = ElementTree.fromstring(drawings.DRAWINGS[name]())
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert root[0].text
    for shape in root.iter():
        x, y = (float(shape.get(key, 0)) for key in "xy")
        right, below = x + float(shape.get("width", "0").rstrip("%")), y + float(shape.get("height", 0))
        if shape is not root:
            half = 0.27 * float(shape.get("font-size", 0)) * len(shape.text or "")  # of a line of words, about
            sides = {"middle": (half, half), "end": (2 * half, 0), "start": (0, 2 * half)}
            left_of, right_of = sides[shape.get("text-anchor", "start")]
            assert x - left_of >= 0, shape.text
            assert max(right, x + right_of) <= width, shape.text
            assert below <= height, shape.text


def test_nothing_is_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not changed keeps its time, by which Sphinx sees what to read again; what is gone is removed."""
    monkeypatch.setitem(generate.TABLES, "models", lambda: "models\n")
    generate.write(tmp_path)
    (tmp_path / "tables" / "old.md").write_text("old")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    generate.write(tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert before.keys() - after.keys() == {tmp_path / "tables" / "old.md"}
    assert all(before[path] == time for path, time in after.items())
    assert {path.name for path in after if fnmatch.fnmatch(path.name, "*.svg")} >= {"tile.svg", "wavefront.svg"}
