"""``fastnn.functional`` under the name that it has in ``torch.nn``."""

from typing import Any

from torch.nn.functional import *  # noqa: F403 (type checkers see the names that fastnn.functional has from there)

from fastnn import functional as _functional
from fastnn._stock import stock_attribute
from fastnn.functional import *  # noqa: F403


def __getattr__(name: str) -> Any:
    return stock_attribute(__name__, _functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_functional)})
