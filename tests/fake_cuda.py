"""CUDA without a GPU: tensors there have shapes and no values, so what would wait for them, or meet them, is seen."""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pytest

_ITEM, _PIN = torch.ops.aten._local_scalar_dense.default, torch.ops.aten._pin_memory.default  # noqa: SLF001
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)  # noqa: SLF001


class ClaimedGenerator(torch.Generator):
    """A generator of the CPU that says it is one of the device asked for: CUDA's needs a driver."""

    claimed: torch.device

    def __new__(cls, device: str | torch.device = "cpu") -> Self:
        made = super().__new__(cls, torch.device("cpu"))  # type: ignore[call-arg]
        made.claimed = torch.device(device)
        return made

    def __init__(self, device: str | torch.device = "cpu") -> None:
        """The claim is made already."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.claimed


class FakeCuda(FakeTensorMode):
    """Tensors of CUDA are fake, those of the CPU are real.

    A value that is read there, and a copy for which the host waits, is noted with the line of ours that asks for it. A
    result whose shape depends on values is an error, and so are tensors of different devices in one operation.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is _PIN:
            return args[0].clone()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if device != "cuda" and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        leaves_cpu = any(tensor.device.type == "cpu" for tensor in tensors) and not kwargs.get("non_blocking", False)
        if func is _ITEM or (func in _COPIES and (leaves_cpu or device == "cpu")):
            self.waits.append(_line_of_ours())
        if func is _ITEM:
            return True if args[0].dtype == torch.bool else 1
        if "_fused_" in str(func):  # of an optimizer, in place; torch knows no shapes of it
            return None
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A context with CUDA, as far as it goes. What needs a driver is set aside: generators, and the backward pass."""

    def give_gradients(loss: Tensor, inputs: Iterable[Tensor]) -> None:
        assert loss.device.type == "cuda"
        for parameter in inputs:
            parameter.grad = torch.zeros_like(parameter)

    patch.setattr(torch, "Generator", ClaimedGenerator)
    patch.setattr(torch.autograd, "backward", give_gradients)
    with FakeCuda() as mode:
        yield mode


def _line_of_ours() -> str:
    ours = [frame for frame in traceback.extract_stack() if "/dfadc/" in frame.filename]
    frame = ours[-1] if ours else traceback.extract_stack()[-3]
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}: {frame.line}"
