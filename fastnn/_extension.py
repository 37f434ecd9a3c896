"""Loads the compiled extension, or says how to build it."""

import importlib
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401 (brings libtorch into the process, which the extension is linked to)

from fastnn._digest import source_digest

_HOW_TO_BUILD = (
    "Build it with 'pip install .' (or 'pip install --no-build-isolation -e .' to develop) in fastnn's source folder; "
    "this takes a C++ compiler, for example 'apt-get install g++'."
)


def load_extension() -> ModuleType:
    """Import ``fastnn._C``; ImportError if it is missing or was built from other sources than those beside it."""
    try:
        extension = importlib.import_module("fastnn._C")
    except ImportError as error:
        raise ImportError(f"fastnn's compiled extension could not be loaded ({error}). {_HOW_TO_BUILD}") from error
    csrc = Path(__file__).parent.parent / "csrc"
    if csrc.is_dir() and source_digest(csrc) != extension.source_digest:
        raise ImportError(f"fastnn's compiled extension is older than the sources in {csrc}. {_HOW_TO_BUILD}")
    return extension
