"""Adapting a network to how it is called here: its images stay unchanged, in any memory format, and may come alone.

What a network does not bear is found by trial, once, and hooks then keep it from happening wherever it is called.
"""

from __future__ import annotations

import contextlib
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dfadc.errors import DfadcError
from dfadc.networks.flops import in_eval_mode, in_mode
from dfadc.networks.logits import LogitsOf, unwrap_logits
from dfadc.networks.user_code import UserCodeFailed, running_user_code

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.contract import ImageContract

#: Images of a trial, and of a second one that shows whether another number is taken.
BATCH, OTHER_BATCH = 2, 3
#: Numbers of images that are tried where BATCH is refused, for the error.
_OTHER_BATCHES = (1, 3, 4, 8, 16, 32, 64)
#: Sides of square images that are tried where the stated ones are refused, for the error.
_OTHER_SIDES = (28, 32, 64, 96, 128, 224)
_WHOLE_RANGE = 255
_ASKS_FOR_GPU = "its forward asks for a GPU: write .to(images.device) instead of .cuda()"
#: Part of an error's message -> remedy.
_REMEDIES = {
    "required positional argument": (
        "its forward needs a second input: give that a default, or wrap it in a module that calls it with one"
    ),
    "NVIDIA": _ASKS_FOR_GPU,
    "not compiled with CUDA": _ASKS_FOR_GPU,
}
#: Largest difference between a network's logits in both memory formats, as a share of their size.
_TOLERANCE = 1e-2


class Adapted(NamedTuple):
    """A network that bears to be called as it is here.

    Args:
        module: with hooks or, where it takes none, wrapped.
        has_gradient: whether a gradient leads from the logits to the images.
        notes: what was done, for the user.
    """

    module: nn.Module
    has_gradient: bool
    notes: tuple[str, ...]


def adapt(module: nn.Module, images: Tensor, role: str, *, learns: bool) -> Adapted:
    """Finds what a network does not bear, and keeps it from that.

    Args:
        module: on the CPU, contiguous. Its weights, statistics and modes stay.
        images: (OTHER_BATCH, C, H, W) in the contract's range.
        role: its name, for errors and notes.
        learns: whether it will be trained.

    Raises:
        DfadcError: it does not take these images, in batches of any size but one, or its output holds no logits.
    """
    notes: list[str] = []
    several = images[:BATCH]
    with _untouched(module):
        output, is_changed = _try(module, several, role)
        if not isinstance(output, Tensor):
            module = LogitsOf(module)
        if is_changed:
            module = hook(module, before=_copy_images)
            notes.append(f"{role} changes its images in place: it is given a copy of them")
        with running_user_code(f"{role} fails on the way back to its images or weights"):
            logits = _forward_and_backward(module, several, learns=learns)
        if problem := _problem_with_channels_last(module, several, learns=learns):
            module = hook(module, before=_make_contiguous)
            notes.append(f"{role} and its images stay contiguous (NCHW), for channels_last fails: {problem}")
        answer = _answers(module, images[:1])
        if answer is None or answer.shape != (1, *logits.shape[1:]):
            if learns:
                raise DfadcError(
                    f"{role} gives no logits for a single image, as its artifacts must",
                    "let its forward keep the batch's axis: squeeze() drops it, flatten(1) does not",
                )
            single = _SingleImages()
            module = hook(module, before=single.before, after=single.after)
            notes.append(f"{role} takes no batch of one image: a single image is sent through it twice")
        notes += _check_other_batch(module, images, logits, role)
    return Adapted(module, logits.requires_grad, tuple(notes))


def random_images(contract: ImageContract) -> Tensor:
    """Uniform noise over the range a real image can have, (OTHER_BATCH, C, H, W); the same every time."""
    low, high = (torch.tensor(bound).view(1, -1, 1, 1) for bound in contract.value_range())
    noise = torch.rand(OTHER_BATCH, *contract.input_size, generator=torch.Generator().manual_seed(0))
    return low + (high - low) * noise


def stays_contiguous(module: nn.Module) -> bool:
    """True for a network that :func:`adapt` found to need contiguous weights and images."""
    hooks = (layer._forward_pre_hooks.values() for layer in module.modules())  # noqa: SLF001 -- there is no other way
    return any(_make_contiguous in each for each in hooks)


def place(module: nn.Module, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
    """Moves a network to a device in place, and to a memory format where it bears that.

    Tensors that it keeps as plain attributes, which ``nn.Module.to`` does not know of, are moved too.
    """
    kept = torch.contiguous_format if stays_contiguous(module) else memory_format
    for layer in () if isinstance(module, torch.jit.ScriptModule) else module.modules():
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}
        vars(layer).update({name: value.to(device) for name, value in plain.items()})
    moved: nn.Module = module.to(device, memory_format=kept)  # type: ignore[call-overload]
    return moved


def hook(module: nn.Module, *, before: Any = None, after: Any = None) -> nn.Module:
    """A network with forward hooks; TorchScript takes none and is wrapped first."""
    if isinstance(module, torch.jit.ScriptModule):
        module = LogitsOf(module)
    if before is not None:
        module.register_forward_pre_hook(before)
    if after is not None:
        module.register_forward_hook(after)
    return module


def _copy_images(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def _make_contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # Not contiguous(), which leaves a single channel with the strides that a convolution takes for channels_last.
    form = torch.contiguous_format
    return tuple(value.clone(memory_format=form) if isinstance(value, Tensor) else value for value in inputs)


class _SingleImages:
    """Sends a single image through a network twice, and takes its first answer."""

    def __init__(self) -> None:
        self.is_single = False

    def before(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Doubles a batch of one."""
        self.is_single = len(inputs[0]) == 1
        return (torch.cat([inputs[0], inputs[0]]), *inputs[1:]) if self.is_single else inputs

    def after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """The answer to one image."""
        return unwrap_logits(output)[:1] if self.is_single else output


def _try(module: nn.Module, images: Tensor, role: str) -> tuple[object, bool]:
    """A network's output for images in eval mode, and whether it changed them.

    Raises:
        UserCodeFailed: it does not take them; the message says which other numbers of them it takes.
    """
    given = images.clone()
    size = "x".join(map(str, images.shape[1:]))
    problem = f"{role} cannot take a batch of {len(images)} images of size {size}"
    try:
        with running_user_code(problem), torch.no_grad(), in_eval_mode(module):
            return module(given), not torch.equal(given, images)
    except UserCodeFailed as exc:
        batches = {count: images[:1].expand(count, -1, -1, -1) for count in _OTHER_BATCHES}
        taken = [str(count) for count, batch in batches.items() if _answers(module, batch) is not None]
        if taken:
            raise UserCodeFailed(
                f"{exc.message}; of batches of 1 to 64 images it takes {', '.join(taken)}",
                "it must take batches of any size: a traced or exported network needs a dynamic batch",
            ) from exc
        remedy = next((words for sign, words in _REMEDIES.items() if sign in exc.message), None)
        raise UserCodeFailed(exc.message, remedy or _remedy(module, images)) from exc


def _remedy(module: nn.Module, images: Tensor) -> str:
    """Remedy for a network that does not take images, by a trial of other images."""
    if _answers(module, images.permute(0, 2, 3, 1).contiguous()) is not None:
        return "it takes channels last (NHWC): wrap it in a module that calls it with images.permute(0, 2, 3, 1)"
    if _answers(module, (images * _WHOLE_RANGE).byte()) is not None:
        return (
            "it takes uint8 images, through which no gradient flows: remove the conversion, and pass --mean and --std"
        )
    height, width = images.shape[2:]
    for channels in (1, 3, 4):
        if _answers(module, images[:, :1].expand(-1, channels, -1, -1)) is not None:
            return f"it takes {channels} channels: pass --input-size {channels}x{height}x{width}"
    for side in _OTHER_SIDES:
        resized = functional.interpolate(images, size=(side, side))
        if _answers(module, resized) is not None:
            return f"it takes images of other sizes: pass --input-size {images.shape[1]}x{side}x{side}, for example"
    return "check --input-size"


def _answers(module: nn.Module, images: Tensor) -> Tensor | None:
    """The logits of images in eval mode; None where a network does not take them."""
    with contextlib.suppress(DfadcError), running_user_code("it fails"):
        return _logits(module, images)
    return None


def _check_other_batch(module: nn.Module, images: Tensor, logits: Tensor, role: str) -> list[str]:
    """Refuses a network that takes batches of one size only, or mixes the images of a batch; notes a random one."""
    problem = f"{role} takes a batch of {BATCH} images, but not of {OTHER_BATCH}"
    with running_user_code(problem, "it must take any number"):
        more = _logits(module, images)
    if len(logits) != BATCH:
        return []
    if more.shape != (OTHER_BATCH, *logits.shape[1:]):
        raise DfadcError(
            f"{role} gives outputs of shape {tuple(logits.shape)} for {BATCH} images, {tuple(more.shape)} for "
            f"{OTHER_BATCH}",
            "it must take batches of any size: its forward may not have one built in",
        )
    if _differs(_logits(module, images), more):
        return [f"{role} gives random outputs: in its forward, dropout needs training=self.training"]
    if _differs(_logits(module, images[:BATCH]), more[:BATCH]):
        raise DfadcError(
            f"{role} gives an image other outputs beside other images",
            "its forward mixes the images of a batch: a softmax takes dim=1, a batch norm eval mode",
        )
    return []


def _differs(logits: Tensor, others: Tensor) -> bool:
    return bool((logits - others).abs().max() > _TOLERANCE * others.abs().max())


def _problem_with_channels_last(module: nn.Module, images: Tensor, *, learns: bool) -> str:
    """Why a network fails on channels_last images or weights, or answers otherwise; empty where it does neither."""
    before = {name: tensor.data for name, tensor in chain(module.named_parameters(), module.named_buffers())}
    logits = _logits(module, images)
    try:
        with running_user_code("it fails"):
            module.to(memory_format=torch.channels_last)
            nhwc = images.clone(memory_format=torch.channels_last)
            answers = [_logits(module, nhwc), _logits(module, images)]
            # Last, for training moves the running statistics.
            _forward_and_backward(module, nhwc, learns=learns)
    except UserCodeFailed as exc:
        return exc.message.removeprefix("it fails: ")
    finally:
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            tensor.data = before.get(name, tensor.data)
    return "its logits are others then" if any(_differs(each, logits) for each in answers) else ""


def _logits(module: nn.Module, images: Tensor) -> Tensor:
    """Logits of images in fp32 and in eval mode."""
    with torch.no_grad(), in_eval_mode(module):
        return unwrap_logits(module(images.clone(memory_format=torch.preserve_format))).float()


def _forward_and_backward(module: nn.Module, images: Tensor, *, learns: bool) -> Tensor:
    """Logits of images in fp32, after a gradient was taken; where it learns in training mode, of the weights too."""
    leaf = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad] if learns else []
    with in_mode(module, training=learns):
        logits = unwrap_logits(module(leaf)).float()
        if logits.requires_grad:
            torch.autograd.grad(logits.square().sum(), [leaf, *weights], allow_unused=True)
    return logits


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Puts back statistics and torch's random state."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    if name in before:
                        buffer.copy_(before[name])
