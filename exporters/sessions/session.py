"""Base of the sessions: a loaded network behind one verb, ``run(images) -> logits``. Needs numpy only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self

DEFAULT_BATCH_SIZE = 64


class Session(ABC):
    """A loaded network. Use it as a context manager; ``run`` is the only verb."""

    #: The device that computes, as the runtime itself reports it.
    device: str
    #: Images per call of the runtime.
    batch_size: int
    #: Reason why other machines may compute other logits for the same images; empty where there is none.
    remark: str = ""

    @abstractmethod
    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Maps (N, C, H, W) float32 images, as the network takes them, to float32 logits (N, K) or (N, K, H, W).

        Raises:
            DfadcError: the images have the wrong shape or dtype, or there are none.
        """

    def close(self) -> None:  # noqa: B027 - a hook: most runtimes need nothing
        """Frees what the runtime holds; the session cannot run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BatchedSession(Session):
    """A session that checks the images and splits them into batches for the runtime.

    Args:
        batch_size: images per call of the runtime.
        fixed_batch: the runtime takes exactly ``batch_size`` images; the last batch is padded, its logits are cut.
        input_size: (C, H, W) of the network; None where only the runtime knows.
    """

    def __init__(
        self, *, batch_size: int, fixed_batch: bool = False, input_size: tuple[int, ...] | None = None
    ) -> None:
        self.batch_size = batch_size
        self._fixed_batch = fixed_batch
        self._input_size = input_size

    @abstractmethod
    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Runs at most ``batch_size`` images."""

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See :meth:`Session.run`."""
        if images.dtype != np.float32:
            raise DfadcError(f"images are {images.dtype}, not float32", "convert and normalise them first")
        if images.ndim != 4 or len(images) == 0:
            raise DfadcError(f"images have shape {images.shape}, not (N, C, H, W) with N of at least 1")
        if self._input_size is not None and images.shape[1:] != self._input_size:
            given, taken = ("x".join(map(str, size)) for size in (images.shape[1:], self._input_size))
            raise DfadcError(f"images are {given}, the network takes {taken}")
        if self.batch_size < 1:
            raise DfadcError(f"batch size {self.batch_size} is below 1")
        batches = []
        for start in range(0, len(images), self.batch_size):
            batch = np.ascontiguousarray(images[start : start + self.batch_size])
            missing = self.batch_size - len(batch) if self._fixed_batch else 0
            if missing:
                batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
            logits = self._run_batch(batch)
            batches.append(logits[: len(logits) - missing].astype(np.float32, copy=False))
        return np.concatenate(batches)
