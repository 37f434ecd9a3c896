"""The built extension, and what import and ``python -m fastnn`` make of it."""

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import _extension
from fastnn._digest import interface_digest
from fastnn._extension import load_extension

ROOT = Path(fastnn.__file__).parent.parent


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
@pytest.mark.skipif(sys.platform == "darwin", reason="needs the GNU nm")
def test_extension_needs_only_the_stable_abi() -> None:
    listing = subprocess.run(
        ["nm", "--dynamic", "--demangle", "--undefined-only", fastnn._C.__file__],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    symbols = [line.split(maxsplit=1)[1] for line in listing.splitlines()]
    assert any("aoti_torch_" in symbol for symbol in symbols), "this is not the extension"
    assert [symbol for symbol in symbols if re.search(r"\b(at|c10|torch)::", symbol)] == []


@pytest.fixture(autouse=True)
def not_loaded() -> Iterator[None]:
    """The extension is looked for anew."""
    load_extension.cache_clear()
    yield
    load_extension.cache_clear()


def test_missing_extension_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastnn._C", None)
    with pytest.raises(ImportError, match=r"pip install \."):
        load_extension()


def test_stale_extension_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastnn._C, "source_digest", "of other sources")
    with pytest.raises(ImportError, match=r"older than the sources.*pip install \."):
        load_extension()


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_stale_extension_in_an_installation(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation has no C++ sources beside it: the extension is held against the operators' Python side."""
    assert re.fullmatch("[0-9a-f]{16}", fastnn._C.interface_digest)
    monkeypatch.setattr(fastnn._C, "interface_digest", interface_digest(ROOT / "fastnn"))
    package = tmp_path / "fastnn"
    shutil.copytree(ROOT / "fastnn", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    monkeypatch.setattr(_extension, "__file__", str(package / "_extension.py"))
    assert load_extension() is fastnn._C
    ops = package / "ops"
    if change == "edited":
        (ops / "rnn.py").write_text((ops / "rnn.py").read_text() + "\n# of another version\n")
    elif change == "added":
        (ops / "more.py").touch()
    else:
        (ops / "rnn_head.py").unlink()
    load_extension.cache_clear()
    with pytest.raises(ImportError, match=r"was built with other Python files.*pip install \."):
        load_extension()


def test_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastnn.__version__)
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("fastnn/**/*.py"), *ROOT.glob("csrc/**/*.cpp")]
    assert [path.name for path in sources if fastnn.__version__ in path.read_text()] == ["setup.py"]


def test_python_m_fastnn_describes_the_installation() -> None:
    # In a process of its own, which has not imported torch yet.
    command = [sys.executable, "-m", "fastnn"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    for fact in (fastnn.__version__, torch.__version__, fastnn._C.instruction_set(), "fastnn::mlp"):
        assert fact in text


def test_sources_use_no_macro_that_torch_2_10_lacks() -> None:
    for path in (Path(__file__).parent.parent / "csrc").rglob("*.[ch]*"):
        assert "STABLE_TORCH_ERROR_CODE_CHECK" not in path.read_text(), path


def test_backend_info() -> None:
    info = fastnn.backend_info()
    assert info.instruction_set in info.supported_instruction_sets
    assert info.threads == torch.get_num_threads()
    assert "fastnn::mlp_backward" in info.cpu_operators
    assert len(str(info).splitlines()) == 12


def test_instruction_set_can_be_chosen(every_instruction_set: str) -> None:
    assert fastnn.backend_info().instruction_set == every_instruction_set
    with pytest.raises(ValueError, match="instruction set 'mmx'"):
        fastnn._C.use_instruction_set("mmx")


def test_fastnn_nn_has_everything_of_torch_nn_and_leaves_it_alone() -> None:
    missing = [name for name in dir(torch.nn) if not hasattr(fastnn.nn, name)]
    assert missing == []
    for fused in fastnn.nn.FUSED:
        assert getattr(fastnn.nn, fused.__name__) is fused
        assert getattr(torch.nn, fused.__name__, None) is not fused
        assert not fused.__module__.startswith("torch")
    assert fastnn.nn.Linear is torch.nn.Linear
    assert fastnn.nn.functional is not torch.nn.functional


@pytest.mark.parametrize("module", ["fastnn.functional", "fastnn.nn.functional"])
def test_functional_has_everything_of_torch_nn_functional(module: str) -> None:
    ours = importlib.import_module(module)
    assert [name for name in dir(F) if not name.startswith("__") and getattr(ours, name) is not getattr(F, name)] == []
    assert {"relu", "mlp", "_canonical_mask"} <= set(dir(ours))
    assert ours.mlp is fastnn.functional.mlp
    star: dict[str, Any] = {}
    exec(f"from {module} import *", star)
    assert star["conv_relu_max_pool2d"] is fastnn.functional.conv_relu_max_pool2d
    assert star["softmax"] is F.softmax


SUBMODULES = [
    info.name.removeprefix("torch.nn.")
    for info in pkgutil.walk_packages(torch.nn.__path__, "torch.nn.", onerror=lambda name: None)
    if info.name != "torch.nn.functional"
]


def test_submodules_of_torch_nn_import() -> None:
    assert {"init", "utils.rnn", "utils.parametrize", "modules.rnn", "attention.flex_attention"} <= set(SUBMODULES)
    code = f"""
import importlib, sys, torch
import fastnn.nn.functional as F
from fastnn.nn.utils.rnn import pad_sequence
import fastnn.nn.utils.parametrize
from fastnn.nn.init import zeros_
assert F.mlp and F.relu is torch.nn.functional.relu and fastnn.nn.functional is F
assert pad_sequence is torch.nn.utils.rnn.pad_sequence and zeros_ is torch.nn.init.zeros_
for name in {SUBMODULES}:
    try:
        stock = importlib.import_module("torch.nn." + name)
    except ImportError:
        continue
    spec = stock.__spec__
    assert importlib.import_module("fastnn.nn." + name) is stock, name
    assert stock.__spec__ is spec and stock.__name__ == "torch.nn." + name
assert not [m for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith(torch.nn.__path__[0])
            and m.__name__.startswith("fastnn")]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["fastnn.nn.no_such", "fastnn.nn.utils.no_such", "fastnn.no_such"])
def test_modules_that_torch_has_not(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
        importlib.import_module(name)


@pytest.mark.parametrize("module", ["fastnn.nn", "fastnn.functional", "fastnn.nn.functional"])
def test_misspelt_name_blames_the_module_it_was_asked_of(module: str) -> None:
    ours = importlib.import_module(module)
    with pytest.raises(AttributeError, match=rf"^module '{module}' has no attribute 'Lineaer'$") as error:
        ours.Lineaer  # noqa: B018
    assert (error.value.name, error.value.obj) == ("Lineaer", ours)
    with pytest.raises(ImportError, match=rf"cannot import name 'Lineaer' from '{module}'"):
        exec(f"from {module} import Lineaer")
