"""Networks that nobody here wrote: what they do not bear is found by trial and kept from them; what fails is named."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from command_line import Outcome, run_command
from torch import Tensor, nn

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.adaptation import place, stays_contiguous
from dfadc.networks.flops import count_flops
from dfadc.networks.user_code import UserCodeFailed, running_user_code
from dfadc.student.build import build_student, list_students
from dfadc.teacher.load import load_teacher

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTRACT = ImageContract(input_size=(1, 8, 8), num_classes=10)
FIELDS = ContractFields(input_size=(1, 8, 8), num_classes=10)
CPU, NHWC = torch.device("cpu"), torch.channels_last

NETWORKS = '''
import argparse
import torch
from torch import nn
from torch.nn import functional


class Plain(nn.Module):
    def __init__(self, num_classes=10, channels=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.deep = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(144, num_classes)

    def features(self, images):
        return self.norm(self.deep(self.conv(images))).relu()

    def forward(self, images):
        return self.head(self.features(images).flatten(1))


class ViewOfActivations(Plain):
    def forward(self, images):
        features = self.features(images)
        return self.head(features.view(features.size(0), -1))


class ViewOfWeights(Plain):
    def forward(self, images):
        weight = self.deep.weight
        weight = weight / weight.view(4, -1).norm(dim=1).view(4, 1, 1, 1)
        return self.head(functional.conv2d(self.conv(images), weight, padding=1).flatten(1))


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features):
        return features.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.view(gradient.size(0), -1).view(gradient.shape)


class ViewOfGradients(Plain):
    def forward(self, images):
        features = Backwards.apply(self.features(images))
        return self.head(functional.max_pool2d(features, 1).flatten(1))


class ViewInTraining(Plain):
    def forward(self, images):
        features = self.features(images)
        return self.head(features.view(features.size(0), -1) if self.training else features.flatten(1))


class ReadsStorage(Plain):
    def forward(self, images):
        features = self.features(images)
        return self.head(features.as_strided((len(features), 144), (144, 1)))


class InPlace(Plain):
    def forward(self, images):
        images -= 0.5
        images.mul_(2)
        return super().forward(images)


class Squeezes(Plain):
    def forward(self, images):
        return super().forward(images).squeeze()


class OneSize(Plain):
    def forward(self, images):
        return self.head(self.features(images).reshape(8, 144))


class Reads(Plain):
    """Makes tensors and reads numbers in its forward."""

    def __init__(self, num_classes=10, channels=1):
        super().__init__(num_classes, channels)
        self.mean = torch.tensor([0.5]).view(1, 1, 1, 1)
        self.width = int(torch.linspace(0, 3, 4).sum().item())

    def forward(self, images):
        images = (images - self.mean) / (1 + float(images.detach().std())) + torch.arange(8)
        assert images.abs().max().item() >= 0
        return super().forward(images)


class Lazy(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        layers = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(num_classes)
        self.net = nn.Sequential(*layers)

    def forward(self, images):
        return self.net(images)


class LazyInVain(Lazy):
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.unused = nn.LazyLinear(3)


class TenOnly(Plain):
    def __init__(self, num_classes=10, channels=1):
        assert num_classes == 10, "ten classes"
        super().__init__(num_classes, channels)


class Talks(Plain):
    def forward(self, images):
        print("shape", tuple(images.shape))
        return super().forward(images)


class Raises(Plain):
    def forward(self, images):
        return {}["no such key"]


class Asserts(Plain):
    def forward(self, images):
        assert images.size(1) == 7


class Forgets(Plain):
    def forward(self, images):
        return self.no_such_layer(images)


class ChannelsLast(Plain):
    def forward(self, images):
        return super().forward(images.permute(0, 3, 1, 2))


class TwoInputs(Plain):
    def forward(self, images, mask):
        return super().forward(images * mask)


class SecondHasDefault(Plain):
    def forward(self, images, scale=1.0):
        return super().forward(images * scale)


class Bytes(Plain):
    def forward(self, images):
        assert images.dtype == torch.uint8
        return super().forward(images.float() / 255)


class RaisesInTraining(Plain):
    def forward(self, images):
        if self.training:
            raise LookupError("not made for it")
        return super().forward(images)


def no_config():
    return open("no_such_config.yaml")


def bad_index():
    return [][3]


def parses():
    return argparse.ArgumentParser().parse_args(["--no-such-flag"])


def never_ends():
    return next(iter(()))


def talks():
    print("building")
    return Plain()
'''
CONTIGUOUS = ("ViewOfActivations", "ViewOfWeights", "ViewOfGradients", "ReadsStorage")


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks lie where the command runs."""
    (tmp_path / "user_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)


def network(name: str) -> nn.Module:
    """A network whose running statistics have seen images."""
    import user_networks  # type: ignore[import-not-found]

    torch.manual_seed(0)
    made: nn.Module = getattr(user_networks, name)()
    for parameter in made.parameters():
        if not torch.nn.parameter.is_lazy(parameter) and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


def saved(name: str) -> Path:
    torch.save(network(name).state_dict(), f"{name}.pt")
    return Path(f"{name}.pt")


def teacher_of(name: str) -> nn.Module:
    return load_teacher(saved(name), architecture=f"user_networks:{name}", fields=FIELDS).module


def images_in(memory_format: torch.memory_format, count: int = 4) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clone(memory_format=memory_format)


def play(module: nn.Module) -> Tensor:
    """A step's forward and backward as a game has them; the images' gradient."""
    images = images_in(NHWC).requires_grad_()
    module(images).square().sum().backward()
    assert images.grad is not None
    return images.grad


@pytest.mark.parametrize("name", CONTIGUOUS)
def test_a_network_that_bears_no_channels_last_is_kept_from_it_in_both_roles(name: str) -> None:
    original = network(name).eval()
    spoiled = copy.deepcopy(original).to(memory_format=NHWC)
    if name == "ReadsStorage":  # fails in silence
        assert not torch.allclose(spoiled(images_in(NHWC)), original(images_in(torch.contiguous_format)), atol=0.1)
    else:
        with pytest.raises(RuntimeError, match="view size"):
            play(spoiled)
    teacher = load_teacher(saved(name), architecture=f"user_networks:{name}", fields=FIELDS)
    assert any("stay contiguous (NCHW)" in note for note in teacher.warnings)
    student = build_student(f"user_networks:{name}", CONTRACT)
    assert any("stay contiguous (NCHW)" in note for note in student.notes)
    for module in (teacher.module, student.module):
        assert stays_contiguous(module)
        gradient = play(place(copy.deepcopy(module), CPU, NHWC))
        assert bool(gradient.isfinite().all())
    placed = place(teacher.module, CPU, NHWC)
    assert torch.equal(placed(images_in(NHWC)), original(images_in(torch.contiguous_format)))


def test_a_network_that_fails_in_training_only_is_kept_from_it_as_a_student() -> None:
    student = build_student("user_networks:ViewInTraining", CONTRACT)
    assert stays_contiguous(student.module)
    play(place(student.module, CPU, NHWC).train())
    assert not stays_contiguous(teacher_of("ViewInTraining"))


@pytest.mark.parametrize("name", ["compact_resnet_4", "user_networks:Plain"])
def test_a_network_that_bears_channels_last_gets_it(name: str) -> None:
    student = build_student(name, CONTRACT)
    assert student.notes == ()
    placed = place(student.module, CPU, NHWC)
    weights = [parameter for parameter in placed.parameters() if parameter.ndim == 4]
    assert weights
    assert all(weight.is_contiguous(memory_format=NHWC) for weight in weights)


def test_a_trial_leaves_weights_statistics_modes_and_random_state_alone() -> None:
    torch.manual_seed(3)
    first = build_student("user_networks:ViewOfActivations", CONTRACT).module
    state = torch.get_rng_state()
    torch.manual_seed(3)
    import user_networks

    twin = user_networks.ViewOfActivations()
    assert torch.equal(torch.get_rng_state(), state)
    for (name, value), other in zip(first.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
        assert value.stride() == other.stride()
    assert all(layer.training for layer in first.modules())
    assert all(parameter.grad is None for parameter in first.parameters())


def test_a_script_that_bears_no_channels_last_is_kept_from_it() -> None:
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

        def forward(self, images: Tensor) -> Tensor:
            features = self.conv(images)
            logits: Tensor = self.head(features.view(features.size(0), -1))
            return logits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.save(torch.jit.script(Scripted()), "script.pt")
        teacher = load_teacher("script.pt", fields=FIELDS, trust=True).module
        play(place(teacher, CPU, NHWC))


def test_a_network_does_not_change_the_images_of_others() -> None:
    for module in (teacher_of("InPlace"), build_student("user_networks:InPlace", CONTRACT).module):
        images = images_in(torch.contiguous_format)
        before = images.clone()
        module(images)
        assert torch.equal(images, before)
        assert play(module).abs().sum() > 0
    expected = network("InPlace").eval()(images_in(torch.contiguous_format))
    assert torch.equal(teacher_of("InPlace")(images_in(torch.contiguous_format)), expected)


def test_a_teacher_that_squeezes_answers_single_images() -> None:
    module = teacher_of("Squeezes")
    images = images_in(torch.contiguous_format)
    assert torch.allclose(module(images[:1]), module(images)[:1], atol=1e-6)
    assert module(images[:1]).shape == (1, 10)
    assert module(images[:2]).shape == (2, 10)
    with pytest.raises(DfadcError, match="no logits for a single image"):
        build_student("user_networks:Squeezes", CONTRACT)


def test_a_batch_size_that_is_built_in_is_named() -> None:
    for build in (lambda: teacher_of("OneSize"), lambda: build_student("user_networks:OneSize", CONTRACT)):
        with pytest.raises(DfadcError, match=r"OneSize.*user_networks.py:\d+.*reshape\(8, 144\)") as caught:
            build()
        assert "2 images" in caught.value.message or "size 1x8x8" in caught.value.message
    with pytest.raises(DfadcError, match=r"of batches of 1 to 64 images it takes 8$"):
        teacher_of("OneSize")


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("TwoInputs", (1, 8, 8), "a second input"),
        ("Bytes", (1, 8, 8), "uint8 images"),
        ("Flat64", (3, 8, 8), "pass --input-size 1x8x8"),
        ("Flat784", (1, 8, 8), "pass --input-size 1x28x28"),
    ],
)
def test_the_remedy_follows_the_reason(name: str, size: tuple[int, int, int], says: str) -> None:
    is_flat = name.startswith("Flat")
    module = nn.Sequential(nn.Flatten(), nn.Linear(int(name[4:]), 10)) if is_flat else network(name)
    torch.save(module, "whole.pt")
    with pytest.raises(DfadcError, match="cannot take a batch") as caught:
        load_teacher("whole.pt", fields=ContractFields(input_size=size), trust=True)
    assert says in caught.value.hint
    assert teacher_of("SecondHasDefault")(images_in(torch.contiguous_format)).shape == (4, 10)


# --------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_of_a_network_that_reads_numbers_are_counted() -> None:
    expected = count_flops(network("Plain"), (1, 8, 8))
    assert expected == 2 * (36 * 4 * 9 + 36 * 4 * 4 * 9 + 144 * 10)
    reads = network("Reads")
    assert count_flops(reads, (1, 8, 8)) == expected
    assert reads.training
    assert count_flops(network("Raises"), (1, 8, 8)) is None
    assert list_students(CONTRACT, ["user_networks:Reads"])[0].flops == expected


def test_a_teacher_that_reads_numbers_is_identified_and_built() -> None:
    saved("Reads")
    teacher = load_teacher("Reads.pt", architecture="user_networks:Reads", fields=ContractFields(input_size=(1, 8, 8)))
    assert teacher.contract.num_classes == 10


def test_a_factory_of_ten_classes_only_is_built_for_the_weights_ten() -> None:
    assert teacher_of("TenOnly")(images_in(torch.contiguous_format)).shape == (4, 10)
    size_alone = ContractFields(input_size=(1, 8, 8))
    teacher = load_teacher("TenOnly.pt", architecture="user_networks:TenOnly", fields=size_alone)
    assert teacher.contract.num_classes == 10


def test_lazy_layers_get_their_weights_or_are_refused() -> None:
    student = build_student("user_networks:Lazy", CONTRACT).module
    assert student(images_in(torch.contiguous_format)).shape == (4, 10)
    torch.save(student.state_dict(), "Lazy.pt")
    loaded = load_teacher("Lazy.pt", architecture="user_networks:Lazy", fields=FIELDS).module
    assert torch.equal(loaded(images_in(NHWC)), student.eval()(images_in(NHWC)))
    with pytest.raises(DfadcError, match=r"LazyInVain has a lazy layer .* unused.weight"):
        build_student("user_networks:LazyInVain", CONTRACT)


# -------------------------------------------------------------------------------------------------------- errors


def commands(name: str) -> Iterator[Outcome]:
    """Each command that a network of the user is given to."""
    as_teacher = ("--teacher-arch", f"user_networks:{name}", "--input-size", "1x8x8", "--num-classes", 10)
    yield run_command("inspect", "Plain.pt", *as_teacher)
    yield run_command("inspect", "Plain.pt", *as_teacher, "--json")
    yield run_command("distill", "Plain.pt", *as_teacher, "--student", "compact_resnet_4", "--steps", 1)
    known = ("--teacher-arch", "user_networks:Plain", "--input-size", "1x8x8", "--num-classes", 10)
    yield run_command("distill", "Plain.pt", *known, "--student", f"user_networks:{name}", "--steps", 1)


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("no_config", "FileNotFoundError", 'return open("no_such_config.yaml")'),
        ("bad_index", "IndexError", "return [][3]"),
        ("parses", "SystemExit", "return argparse.ArgumentParser()"),
        ("never_ends", "StopIteration", "return next(iter(()))"),
        ("Raises", "KeyError: 'no such key'", 'return {}["no such key"]'),
        ("Asserts", "AssertionError", "assert images.size(1) == 7"),
        ("Forgets", "AttributeError", "return self.no_such_layer(images)"),
    ],
)
def test_whatever_the_users_code_raises_is_one_error_with_its_line(name: str, error: str, line: str) -> None:
    saved("Plain")
    for outcome in commands(name):
        assert outcome.code == 2
        (said,) = outcome.errors
        assert f"user_networks:{name}" in said
        assert error in said
        assert "user_networks.py:" in said
        assert line in said
        assert outcome.out == ""
        assert "Traceback" not in outcome.err


def test_what_fails_in_training_alone_is_an_error_of_the_student() -> None:
    with pytest.raises(
        UserCodeFailed, match=r"student user_networks:RaisesInTraining.*not made for it.*networks.py:\d+"
    ):
        build_student("user_networks:RaisesInTraining", CONTRACT)
    teacher_of("RaisesInTraining")


def test_what_the_users_module_raises_on_import_is_named() -> None:
    Path("breaks.py").write_text("import json\n\njson.loads('no JSON')\n")
    Path("typo.py").write_text("def factory(:\n    pass\n")
    for name, says in (("breaks", "breaks.py:3: json.loads('no JSON')"), ("typo", "typo.py:1")):
        with pytest.raises(UserCodeFailed, match=f"cannot import '{name}'") as caught:
            build_student(f"{name}:factory", CONTRACT)
        assert says in caught.value.message


def test_what_the_users_code_prints_stays_out_of_the_result() -> None:
    saved("Plain")
    for name in ("Talks", "talks"):
        as_teacher = ("--teacher-arch", f"user_networks:{name}", "--input-size", "1x8x8", "--num-classes", 10)
        outcome = run_command("inspect", "Plain.pt", *as_teacher, "--json")
        assert outcome.code == 0
        assert outcome.out.startswith("{\n")
        assert "shape" in outcome.err or "building" in outcome.err
        assert "shape (" not in outcome.out


def test_ctrl_c_and_our_own_errors_pass_the_boundary_as_they_are() -> None:
    for raised in (KeyboardInterrupt(), DfadcError("ours", "our hint")):
        with pytest.raises(type(raised)) as caught, running_user_code("it failed"):
            raise raised
        assert caught.value is raised


def test_a_copy_of_a_network_runs_as_user_code_too() -> None:
    module = teacher_of("Plain")
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(images_in(NHWC)).any()
    assert module(images_in(NHWC)).any()
    with pytest.raises(UserCodeFailed, match=r"the forward of user_networks:Plain failed"):
        twin(torch.zeros(2, 3, 8, 8))


def test_tensors_that_are_plain_attributes_move_with_the_network() -> None:
    module = place(network("Reads"), torch.device("meta"), torch.contiguous_format)
    assert module.mean.is_meta
