"""How strongly the teacher's last features answer; a scalar to be minimised, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Activation:
    """-mean |f| of the features f that the teacher's last layer reads: real images excite more of them than noise.

    Source: DAFL (1904.01186, eq. 4), also 2102.11638. The paper sums over the features; a mean weighs the same for
    every width, as the authors' code has it.

    Args:
        classifier: the layer that turns features into logits, from :func:`find_classifier`.
    """

    def __init__(self, classifier: nn.Module) -> None:
        self.watching = False
        self._features: Tensor | None = None
        self._handle: RemovableHandle = classifier.register_forward_pre_hook(self._observe)

    def close(self) -> None:
        """Takes the hook off the teacher."""
        self._handle.remove()

    def take(self) -> Tensor:
        """The term of the last watched forward pass; forgets it."""
        assert self._features is not None, "nothing was watched"  # noqa: S101
        features, self._features = self._features, None
        return -features.float().abs().mean()

    def _observe(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.watching:
            self._features = inputs[0]


def find_classifier(teacher: nn.Module, num_classes: int) -> nn.Module | None:
    """The last linear layer, or convolution, with one output for each class; None where there is none to watch."""
    found: nn.Module | None = None
    for layer in teacher.modules():
        is_linear = isinstance(layer, nn.Linear) and layer.out_features == num_classes
        if is_linear or (isinstance(layer, nn.Conv2d) and layer.out_channels == num_classes):
            found = layer
    return found
