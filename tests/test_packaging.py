"""The built extension, and what import and ``python -m fastnn`` make of it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnn
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


def test_missing_extension_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastnn._C", None)
    with pytest.raises(ImportError, match=r"pip install \."):
        load_extension()


def test_stale_extension_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastnn._C, "source_digest", "of other sources")
    with pytest.raises(ImportError, match=r"older than the sources.*pip install \."):
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


def test_instruction_set_can_be_chosen(instruction_set: str) -> None:
    assert fastnn.backend_info().instruction_set == instruction_set
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
    assert fastnn.nn.functional is torch.nn.functional
    with pytest.raises(AttributeError):
        fastnn.nn.no_such_layer  # noqa: B018
