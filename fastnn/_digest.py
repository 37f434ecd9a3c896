"""A fingerprint of the C++ sources, by which an import notices an extension built from others."""

import hashlib
from pathlib import Path


def source_digest(csrc: Path) -> str:
    """Hash of every C++ file below `csrc`, by path and content."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
