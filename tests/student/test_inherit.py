"""A student that is its teacher made smaller starts from the teacher's weights, and no other does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfadc import load_teacher
from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import save_network
from dfadc.student.build import build_student
from dfadc.student.inherit import copy_weights_, corresponding_layers, find_copy, inherit

if TYPE_CHECKING:
    from pathlib import Path

CONTRACT = ImageContract((1, 28, 28), 5)


def flattening(width: int) -> nn.Module:
    """Its maps of 2 x 2 are flattened: each channel is four features in a row."""
    convolutions = (nn.Conv2d(1, width, 3, stride=5, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2))
    head = (nn.Linear(2 * width * 4, 3 * width), nn.ReLU(), nn.Linear(3 * width, 5))
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), *head)


def inherit_weights_(student: nn.Module, teacher: nn.Module, size: tuple[int, int, int] = CONTRACT.input_size) -> bool:
    """True for a student that is the teacher made smaller, which then has its weights."""
    copy = find_copy(student, teacher, torch.randn(2, *size))
    if isinstance(copy, str):
        return False
    copy_weights_(student, teacher, copy)
    return True


def build(name: str) -> nn.Module:
    if name.startswith("flattening"):
        return flattening(int(name.rpartition("_")[2]))
    return build_student(name, CONTRACT).module


def with_random_statistics(module: nn.Module) -> nn.Module:
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_mean", "running_var", "bias")):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module.eval()


def hide(small: nn.Module, large: nn.Module, *, pixels: int) -> None:
    """Gives the large network the small one's weights, in channels that are drawn, and next to nothing elsewhere."""
    places: dict[tuple[int, int], Tensor] = {}
    for tensor, wide in zip(small.state_dict().values(), large.state_dict().values(), strict=True):
        wide.copy_(1e-4 * torch.randn(wide.shape))
        index = []
        for axis, widths in enumerate(zip(wide.shape[:2], tensor.shape[:2], strict=True)):
            before = places.get((widths[0] // pixels, widths[1] // pixels))
            if axis == 1 and widths not in places and before is not None:
                places[widths] = (pixels * before[:, None] + torch.arange(pixels)).flatten()
            index.append(places.setdefault(widths, torch.randperm(widths[0])[: widths[1]].sort().values))
        wide[torch.meshgrid(*index, indexing="ij") if index else ...] = tensor


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("lenet5_half", "lenet5"),
        ("compact_resnet_10", "compact_resnet_24"),
        ("flattening_3", "flattening_10"),
    ],
)
@torch.no_grad()
def test_the_channels_that_matter_are_found_and_stay_connected(small: str, large: str) -> None:
    torch.manual_seed(0)
    wanted, teacher, student = with_random_statistics(build(small)), build(large).eval(), build(small).eval()
    hide(wanted, teacher, pixels=4)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    assert inherit_weights_(student, teacher)
    images = torch.randn(4, *CONTRACT.input_size)
    torch.testing.assert_close(student(images), wanted(images))
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_a_buffer_as_long_as_nothing_else_is_cut_off() -> None:
    student, teacher = build("flattening_3"), build("flattening_10")
    student.register_buffer("positions", torch.zeros(7), persistent=True)
    teacher.register_buffer("positions", torch.arange(9.0), persistent=True)
    assert not inherit_weights_(student, build("flattening_10"))
    assert inherit_weights_(student, teacher)
    assert student.get_buffer("positions").tolist() == list(range(7))


def test_a_shallower_student_takes_the_first_blocks_of_each_stage() -> None:
    student, teacher = (build_architecture(name, CONTRACT).module for name in ("resnet18", "resnet34"))
    assert inherit_weights_(student, teacher.eval(), (1, 32, 32))
    given = teacher.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("lenet5_half", "lenet5_half"),  # nothing is smaller
        ("lenet5", "lenet5_half"),
        ("lenet5_half", "compact_resnet_16"),
        ("resnet18", "resnet50"),  # other kernels
        ("vgg11_bn", "vgg13_bn"),  # layers of the same name are others
    ],
)
def test_others_keep_their_own_weights(student: str, teacher: str) -> None:
    contract = ImageContract((1, 32, 32), 5)
    torch.manual_seed(0)
    own, given = (build_architecture(name, contract).module for name in (student, teacher))
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    assert not inherit_weights_(own, given, (1, 32, 32))
    torch.testing.assert_close(own.state_dict(), before, rtol=0, atol=0)


def test_a_small_stem_makes_it_another_network() -> None:
    """Its weights would fit, and its maps are not the teacher's."""
    contract = ImageContract((3, 32, 32), 5)
    teacher = build_student("shufflenet_v2_x1_0", contract, stem="default").module
    students = {stem: build_student("shufflenet_v2_x0_5", contract, stem=stem).module for stem in ("small", "default")}
    images = torch.randn(2, 3, 32, 32)
    refusal, copy = (find_copy(students[stem], teacher, images) for stem in ("small", "default"))
    assert isinstance(refusal, str)
    assert "other strides" in refusal
    assert not isinstance(copy, str)
    assert corresponding_layers(students["default"], teacher, copy)


def test_who_insists_is_told_where_it_is_impossible(saved_teacher: Path) -> None:
    teacher = load_teacher(saved_teacher)
    narrower = inherit(build_student("lenet5_half", teacher.contract), teacher, "on")
    assert "starts as lenet5 made smaller" in narrower.notes[-1]
    other = build_student("compact_resnet_10", teacher.contract)
    assert inherit(other, teacher, "off") is other
    assert "for it is not the teacher made smaller: its last layer is" in inherit(other, teacher, "auto").notes[-1]
    with pytest.raises(DfadcError, match=r"compact_resnet_10 is not the teacher lenet5 .* last") as caught:
        inherit(other, teacher, "on")
    assert caught.value.exit_code == 2
    assert "student.inherit=auto" in caught.value.hint


@pytest.fixture
def saved_teacher(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.safetensors"
    save_network(path, build("lenet5"), architecture="lenet5", stem="default", contract=CONTRACT)
    return path


class DoublesOnTheCpuAlone(TorchDispatchMode):
    """Fails where anything in double precision is computed on an accelerator: MPS has none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, tuple | list) else [given]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                assert tensor.device.type == "cpu", func
        return given


@pytest.mark.parametrize("pair", [("compact_resnet_16", "compact_resnet_8"), ("flattening_8", "flattening_4")])
@pytest.mark.parametrize(("teacher_device", "student_device"), [("cuda:0", "cpu"), ("cuda:0", "cuda:0")])
def test_a_teacher_on_an_accelerator_is_inherited_from(
    pair: tuple[str, str], teacher_device: str, student_device: str
) -> None:
    """Fake tensors have a device and no values: no accelerator is needed to see that devices meet."""
    teacher, student = (build(name) for name in pair)
    copy = find_copy(student, teacher, torch.randn(2, *CONTRACT.input_size))
    assert not isinstance(copy, str)
    with FakeTensorMode(allow_non_fake_inputs=True), DoublesOnTheCpuAlone():  # type: ignore[no-untyped-call]
        for module, device in ((teacher, teacher_device), (student, student_device)):
            for layer in module.modules():
                for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    setattr(layer, name, nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake)
        copy_weights_(student, teacher, copy)
        if student_device == teacher_device:
            layers = corresponding_layers(student, teacher, copy)
            assert layers
            assert {layer.channels.device for layer in layers} == {torch.device(teacher_device)}
