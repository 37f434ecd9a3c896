"""What operators keep from call to call."""

from typing import Any, ClassVar

import torch


class Plans(dict):
    """What an operator has made of the arguments of earlier calls, by all that it depends on (:func:`facts` of the
    tensors): checks, choices and launchers cost ten times what a launch does. No plan holds a user's tensor."""

    _MOST = 1024
    _all: ClassVar[list["Plans"]] = []

    def __init__(self) -> None:
        super().__init__()
        self._all.append(self)

    def keep(self, key: Any, plan: Any) -> Any:
        if len(self) >= self._MOST:
            self.clear()
        self[key] = plan
        return plan

    @classmethod
    def forget_all(cls) -> None:
        for plans in cls._all:
            plans.clear()


def facts(tensor: torch.Tensor | None) -> Any:
    """All of a tensor that a plan may depend on."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
