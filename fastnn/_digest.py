"""Fingerprints of the sources, by which an import notices an extension built from others."""

import hashlib
from pathlib import Path


def source_digest(csrc: Path) -> str:
    """Hash of every C++ file below `csrc`, by path and content."""
    return _digest(csrc, (".h", ".cpp"))


def interface_digest(package: Path) -> str:
    """Hash of the operators' Python files, in the folder ops of the package fastnn. An installation has these sources
    and no others."""
    return _digest(package / "ops", (".py",))


def _digest(folder: Path, suffixes: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in suffixes:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
