"""State dicts: wrapper prefixes, and strict loading that names each misfit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

#: Prefixes that DataParallel, torch.compile and FSDP put before every key.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
_SHOWN = 3


def strip_wrapper_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes ``module.`` and ``_orig_mod.`` where every key has them."""
    stripped = dict(state_dict)
    while prefix := next(
        (p for p in WRAPPER_PREFIXES if stripped and all(key.startswith(p) for key in stripped)), None
    ):
        stripped = {key.removeprefix(prefix): tensor for key, tensor in stripped.items()}
    return stripped


def load_strictly_(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    architecture: str,
    source: str,
    classes_may_differ: bool = False,
) -> None:
    """Copies the weights into the module in place.

    Args:
        module: the network; on the meta device it is checked alone.
        state_dict: weights by name.
        architecture: its name, for errors.
        source: the file, for errors.
        classes_may_differ: leaves out a difference in shapes where no name is missing or unexpected.

    Raises:
        DfadcError: a key is missing or unexpected, or a shape differs; the first few are named and all are counted.
    """
    expected: dict[str, Tensor] = module.state_dict()
    unexpected = [key for key in state_dict if key not in expected]
    # Old checkpoints lack the counter, which nothing but a training step reads.
    missing = [key for key in expected if key not in state_dict and not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} is {_shape(tensor)}, not {_shape(expected[key])}"
        for key, tensor in state_dict.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    if classes_may_differ and not missing and not unexpected:
        return
    problems = [
        f"{len(found)} {what} ({', '.join(found[:_SHOWN])}{', …' if len(found) > _SHOWN else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise DfadcError(
            f"the weights of {source} do not fit {architecture}: {'; '.join(problems)}",
            "choose the architecture the weights were trained with (--teacher-arch, student.weights)",
        )
    # Some layers (torchvision's MNASNet) ask for the version of their format, which only a module's own dict carries.
    expected.update(state_dict)
    module.load_state_dict(expected)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
