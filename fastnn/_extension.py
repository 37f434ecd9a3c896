"""Loads the compiled extension, or says how to build it."""

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401 (brings libtorch into the process, which the extension is linked to)

from fastnn._digest import interface_digest, source_digest

_HOW_TO_BUILD = (
    "Install a wheel of fastnn-torch, or build it with 'pip install .' (or 'pip install --no-build-isolation -e .' to "
    "develop) in fastnn's source folder; this takes a C++ compiler, for example 'apt-get install g++'."
)


@cache
def load_extension() -> ModuleType:
    """Import ``fastnn._C``. Raises ImportError if it is missing, or if it was built from other sources than those that
    lie beside it: the C++ files in a source folder, the operators' Python files in an installation."""
    try:
        extension = importlib.import_module("fastnn._C")
    except ImportError as error:
        raise ImportError(f"fastnn's compiled extension could not be loaded ({error}). {_HOW_TO_BUILD}") from error
    package = Path(__file__).parent
    csrc = package.parent / "csrc"
    if csrc.is_dir():
        if source_digest(csrc) != extension.source_digest:
            raise ImportError(f"fastnn's compiled extension is older than the sources in {csrc}. {_HOW_TO_BUILD}")
    elif interface_digest(package) != extension.interface_digest:
        raise ImportError(
            f"fastnn's compiled extension was built with other Python files than those in {package}: an older version "
            f"was left there, or part of another copied over it. First 'pip uninstall fastnn-torch'. {_HOW_TO_BUILD}"
        )
    return extension
