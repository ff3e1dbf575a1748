"""TensorBoard event files of a run, beside its metrics.jsonl; only where a recipe asks for them."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from dfadc.errors import RequirementMissing, StorageFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.tensorboard import SummaryWriter

    from dfadc.recipe.schema import LogSettings
    from dfadc.run_folder import RunFolder
    from dfadc.training.callbacks import Reading


def require_tensorboard(settings: LogSettings) -> None:
    """Refuses a run that could not write the event files of its recipe.

    Raises:
        RequirementMissing: event files are asked for, and the package that writes them is not there.
    """
    if settings.tensorboard:
        _load_writer()


@contextmanager
def event_files(
    settings: LogSettings, folder: RunFolder, from_step: int, on_reading: Callable[[Reading], None]
) -> Iterator[Callable[[Reading], None]]:
    """An observer that writes every reading as events, where the settings ask for it, and then tells ``on_reading``.

    Args:
        settings: of the recipe.
        folder: where the event files go.
        from_step: steps that the run has done; events of an interrupted part that lie behind it do not count.
        on_reading: called in any case.

    Raises:
        StorageFailed: the files cannot be written; raised by the observer as well.
    """
    if not settings.tensorboard:
        yield on_reading
        return
    with _storage_errors(folder):
        writer = _load_writer()(str(folder.path), purge_step=from_step + 1 if from_step else None)

    def write(reading: Reading) -> None:
        with _storage_errors(folder):
            _write(writer, reading)
        on_reading(reading)

    try:
        yield write
    finally:
        # Everything was flushed before: an error here was raised already.
        with suppress(OSError):
            writer.close()


def _load_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra, and three seconds
    except ImportError as exc:
        raise RequirementMissing(
            f"log.tensorboard = true needs the package tensorboard: {exc}",
            "pip install 'dfadc[tensorboard]', or leave log.tensorboard away",
        ) from exc
    return SummaryWriter


def _write(writer: SummaryWriter, reading: Reading) -> None:
    scalars = {
        "loss/student": reading.student_loss,
        "loss/generator": reading.generator_loss,
        **{f"generator_term/{name}": value for name, value in reading.terms.items()},
        "probe/agreement": reading.agreement,
        "probe/class_entropy": reading.class_entropy,
        "learning_rate/student": reading.student_rate,
        "learning_rate/generator": reading.generator_rate,
        "speed/images_per_second": reading.images_per_second,
    }
    for name, value in scalars.items():
        writer.add_scalar(name, value, reading.step)
    if reading.note:
        writer.add_text("note", reading.note, reading.step)
    # A reading that was shown is on disk, and a full disk raises now.
    writer.flush()


@contextmanager
def _storage_errors(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageFailed(
            f"cannot write event files into {folder.path}: {exc.strerror or exc}",
            f"free some space, then go on: dfadc distill --resume {folder.path}",
        ) from exc
