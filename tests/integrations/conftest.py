"""What of this folder `make test` runs too: files that need no package and take few seconds. `make test-integrations`
names the folder, and runs all."""

from pathlib import Path

import pytest

QUICK = ("test_data_loading.py", "test_reinforcement.py", "test_torch_utilities.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_named = any("integrations" in argument for argument in config.args)
    return None if is_named or collection_path.is_dir() or collection_path.name in QUICK else True
