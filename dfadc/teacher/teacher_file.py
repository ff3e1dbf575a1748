"""Contents of an opened teacher file: the value that every reader returns and that planning starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from dfadc.teacher.file_kind import FileKind
    from dfadc.teacher.training_arguments import TrainingArguments

#: Remedy where a file holds code.
SAVE_AGAIN = (
    "save the weights alone where the network's code is: torch.save(network.state_dict(), 'teacher.pt'), and name the "
    "architecture with --teacher-arch; or, if you trust the file, pass --trust-teacher"
)
#: Remedy where a file cannot be read.
DAMAGED = "the file is damaged or cut off: copy or download it again"


def first_line(exc: BaseException | None) -> str:
    """First line of a foreign error's text; its type where it has none."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]


@dataclass(frozen=True, slots=True)
class TeacherFile:
    """The contents of a teacher file: either weights or a whole module.

    Args:
        path: the file that was read; where the user named a folder, the file in it.
        kind: its kind, by bytes.
        state_dict: weights by name, wrapper prefixes removed; None where the file holds a module.
        module: the module, on the CPU; None where the file holds weights.
        metadata: free text of a safetensors file.
        input_size: (C, H, W) where the file itself states it (``.pt2``, ONNX, Keras).
        channels: C where the file itself states it.
        notes: what was unwrapped, left out or restored, for the user.
        arguments: contract and architecture as a training framework saved them beside the weights; None where it did
            not.
        network_class: class of a whole network whose weights alone were read; empty for a state dict.
        cut_head: last layer that the reader left out or that the file says to follow, such as Sigmoid; empty for none.
        output: of several outputs the one that the user or a sidecar names; None where neither does.
        has_chosen_output: the reader has chosen among the network's outputs.
        inert: names of classes and functions in the file that were read as plain records; none of them ran.
    """

    path: Path
    kind: FileKind
    state_dict: Mapping[str, Tensor] | None = None
    module: nn.Module | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    input_size: tuple[int, int, int] | None = None
    channels: int | None = None
    notes: tuple[str, ...] = ()
    arguments: TrainingArguments | None = None
    cut_head: str = ""
    output: str | None = None
    has_chosen_output: bool = False
    inert: tuple[str, ...] = ()
    network_class: str = ""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All weights by name, those of a module included."""
        return dict(self.state_dict or {}) if self.module is None else self.module.state_dict()
