"""Form in which a teacher takes its images: (N, C, H, W), channels last, flat vectors, or rows of a grey image."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dfadc.networks.adaptation import BATCH
from dfadc.networks.flops import in_eval_mode
from dfadc.networks.logits import Wrapper, list_outputs
from dfadc.networks.user_code import UserCodeFailed, running_user_code

if TYPE_CHECKING:
    from collections.abc import Callable

_Form = tuple[str, "Callable[[Tensor], Tensor]"]
_FORMS: tuple[_Form, ...] = (
    ("(N, H, W, C)", lambda images: images.permute(0, 2, 3, 1).contiguous()),
    ("(N, C*H*W)", lambda images: images.flatten(1)),
)
_GREY_FORMS: tuple[_Form, ...] = (("(N, H, W)", lambda images: images.squeeze(1)),)


class ImageForm(Wrapper):
    """Wraps a network that takes images in another form.

    Args:
        wrapped: images of that form -> its output.
        form: images (N, C, H, W) -> images of that form.
    """

    def __init__(self, wrapped: nn.Module, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__(wrapped)
        self.form = form

    def forward(self, images: Tensor) -> object:
        """Images (N, C, H, W), normalised -> the network's output."""
        return self.wrapped(self.form(images))


def find_form(module: nn.Module, images: Tensor) -> tuple[nn.Module, object, list[str]]:
    """Tries the forms that networks take images in, the usual one first.

    A form counts where batches of two sizes give outputs of as many rows: a convolution takes (C, H, W) for one image.

    Args:
        module: frozen, on the CPU.
        images: (N, C, H, W), more than BATCH.

    Returns:
        The network, wrapped where its images are reshaped; its output for the first images, None where it takes them in
        no form; and notes for the user.
    """
    output = _output(module, images[:BATCH])
    if output is not None:
        return module, output, []
    for name, form in (*_FORMS, *(_GREY_FORMS if images.shape[1] == 1 else ())):
        wrapped = ImageForm(module, form)
        outputs = [_output(wrapped, part) for part in (images[:BATCH], images)]
        rows = [{len(tensor) for tensor in list_outputs(each).values() if tensor.ndim} for each in outputs]
        if BATCH in rows[0] and len(images) in rows[1]:
            return wrapped, outputs[0], [f"the teacher takes images {name}, and is given those of (N, C, H, W) so"]
    return module, None, []


def _output(module: nn.Module, images: Tensor) -> object:
    """A network's output; None where it fails."""
    with contextlib.suppress(UserCodeFailed), running_user_code("it fails"), torch.no_grad(), in_eval_mode(module):
        return module(images.clone())
    return None
