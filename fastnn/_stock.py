"""Lets a module of ours stand in for one of torch's: names and submodules that ours lacks come from torch's."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def stock_attribute(module: str, stock: ModuleType, name: str) -> Any:
    """What ``module.__getattr__(name)`` gives: ``stock.name``, or an AttributeError that names ``module``."""
    try:
        return getattr(stock, name)
    except AttributeError:
        message = f"module {module!r} has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[module]) from None


class StockSubmodules(MetaPathFinder, Loader):
    """Finds the submodules that ``package`` lacks in ``stock``, when they are imported: the same modules, by a second
    name. It goes before Python's own finders, which would load a submodule's submodule as a copy."""

    def __init__(self, package: str, stock: str) -> None:
        self.package, self.stock = package, stock

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self.package + "."):
            return None
        parent = fullname.rpartition(".")[0]
        if parent == self.package and PathFinder.find_spec(fullname, path):
            return None  # the package has this submodule itself
        try:
            self._stock_module(fullname)
        except ModuleNotFoundError:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        # `import` takes the module from here. (If create_module returned it, `import` would replace its __spec__.)
        sys.modules[module.__name__] = self._stock_module(module.__name__)

    def _stock_module(self, fullname: str) -> ModuleType:
        return importlib.import_module(self.stock + fullname.removeprefix(self.package))
