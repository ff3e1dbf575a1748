"""Architectures as people write and change them: names, factories, classifiers, stems, positions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from command_line import run_command
from torch import Tensor, nn
from torchvision.models import (
    VisionTransformer,
    get_model,
    googlenet,
    mobilenet_v3_small,
    resnet18,
    squeezenet1_1,
)

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.adaptation import adapt, random_images
from dfadc.networks.architecture_name import add_arguments, split_arguments, with_arguments
from dfadc.networks.names import build_architecture, resolve_architecture
from dfadc.teacher.load import Teacher, inspect_teacher, load_teacher
from dfadc.teacher.plan import freeze_
from dfadc.teacher.probe import KNOWN_FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable

RGB = ContractFields(input_size=(3, 32, 32))
GREY = ContractFields(input_size=(1, 28, 28))

CODE = '''
import torch, torchvision
from torch import nn


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8 * 13 * 13, 10)

    def forward(self, x):
        x = torch.max_pool2d(self.conv(x).relu(), 2)
        return self.fc(x.view(x.size(0), -1))


class TwoHeads(nn.Module):
    """The last linear layer is not the classifier."""

    def __init__(self, nclass=10):
        super().__init__()
        self.conv, self.fc, self.rotation = nn.Conv2d(3, 8, 3), nn.Linear(8, nclass), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


class Cosine(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 8, 3), nn.Linear(8, 6)
        self.prototypes = nn.Parameter(torch.randn(n_classes, 6))

    def forward(self, x):
        features = nn.functional.normalize(self.embed(self.conv(x).mean((2, 3))))
        return 10 * features @ nn.functional.normalize(self.prototypes).T


class Sized(nn.Module):
    def __init__(self, input_size=32, width=2):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 1), nn.Linear(width * input_size ** 2, 10)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


class Pair(nn.Module):
    def __init__(self, img_size=(32, 32), in_chans=3, num_labels=10):
        super().__init__()
        self.fc = nn.Linear(in_chans * img_size[0] * img_size[1], num_labels)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Conv1x1(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 10, 1))

    def forward(self, x):
        return self.net(x)


class Lightning(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.model = TwoHeads(num_classes)

    def forward(self, x):
        return self.model(x)


whole = TwoHeads(6)


def at_module_level():
    return whole


def makes_tensors(num_classes):
    network = TwoHeads(num_classes)
    network.scale = float(torch.linspace(0, 1, 3).sum())
    return network
'''


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(tmp_path, "nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in ("nets", "dfadc_user_nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def nets() -> Any:
    from dfadc.networks.factory import import_file

    return import_file(Path("nets.py"))


def loaded(network: nn.Module, architecture: str | None = None, fields: ContractFields = RGB) -> Teacher:
    torch.manual_seed(0)
    network.eval()
    torch.save(network.state_dict(), "t.pt")
    teacher = load_teacher("t.pt", architecture=architecture, fields=fields)
    images = torch.randn(3, *teacher.contract.input_size)
    expected: Tensor = network(images)
    torch.testing.assert_close(teacher.module(images).flatten(1), expected.flatten(1), rtol=1e-4, atol=1e-4)
    return teacher


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("resnet18", "torchvision:resnet18"),
        ("ResNet-18", "torchvision:resnet18"),
        ("torchvision.models.resnet18", "torchvision:resnet18"),
        ("torchvision/resnet18", "torchvision:resnet18"),
        ("torchvision:ResNet18", "torchvision:resnet18"),
        ("torchvision.models.segmentation.fcn_resnet50", "torchvision:fcn_resnet50"),
        ("efficientnet-b0", "torchvision:efficientnet_b0"),
        ("MobileNetV2", "torchvision:mobilenet_v2"),
        ("LeNet5", "lenet5"),
        ("torchvision.models:resnet18", "torchvision.models:resnet18"),
        ("my.package:factory", "my.package:factory"),
        ("path/to/file.py:Net", "path/to/file.py:Net"),
        ("file.py:Net( width = 2,norm='b' )", "file.py:Net(norm='b', width=2)"),
    ],
)
def test_names_as_people_write_them(written: str, canonical: str) -> None:
    assert resolve_architecture(written).canonical == canonical
    assert resolve_architecture(canonical).canonical == canonical


@pytest.mark.parametrize("written", ["timm/resnet18.a1_in1k", "timm:resnet18.a1_in1k", "timm.models.resnet18.a1_in1k"])
def test_names_of_timm(written: str) -> None:
    pytest.importorskip("timm")
    assert resolve_architecture(written).canonical == "timm:resnet18.a1_in1k"
    assert resolve_architecture("efficientnet_lite0").canonical == "timm:efficientnet_lite0"


def test_arguments_are_part_of_a_name() -> None:
    assert (
        add_arguments("a.py:Net", ["width=2", "norm=batch", "deep=true"])
        == "a.py:Net(deep=True, norm='batch', width=2)"
    )
    assert add_arguments("a.py:Net(width=1, x=[1, 2])", ["width=2"]) == "a.py:Net(width=2, x=[1, 2])"
    assert split_arguments("a.py:Net(width=2)") == ("a.py:Net", (("width", 2),))
    assert with_arguments("a", ()) == "a"
    for wrong in ("a.py:Net(2)", "a.py:Net(width=open('x'))", "a.py:Net(**{})", "a.py:Net(width=)"):
        with pytest.raises(DfadcError, match="cannot read the arguments"):
            split_arguments(wrong)
    with pytest.raises(DfadcError, match="is not NAME=VALUE"):
        add_arguments("a", ["width"])
    with pytest.raises(DfadcError, match="belongs to an architecture"):
        add_arguments(None, ["width=2"])
    with pytest.raises(DfadcError, match="would be downloaded"):
        resolve_architecture("hf-hub:timm/resnet18.a1_in1k")


# ------------------------------------------------------------------------------------------------------- factories


@pytest.mark.parametrize(
    ("name", "make", "classes"),
    [
        ("TwoHeads", lambda: nets().TwoHeads(), 10),
        ("TwoHeads", lambda: nets().TwoHeads(7), 7),
        ("Cosine", lambda: nets().Cosine(9), 9),
        ("Sized", lambda: nets().Sized(), 10),
        ("Pair", lambda: nets().Pair(num_labels=6), 6),
        ("Conv1x1", lambda: nets().Conv1x1(), 10),
        ("at_module_level", lambda: nets().whole, 6),
        ("makes_tensors", lambda: nets().TwoHeads(5), 5),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_factory_in_a_file_builds_the_teacher_of_its_outputs(
    name: str, make: Callable[[], nn.Module], classes: int
) -> None:
    teacher = loaded(make(), f"nets.py:{name}")
    assert teacher.contract.num_classes == classes
    assert teacher.contract.task == "classification"
    assert teacher.contract_sources["num_classes"] == "shape of the outputs"


def test_a_factory_is_given_its_arguments_and_the_size() -> None:
    teacher = loaded(nets().Sized(width=5), "nets.py:Sized(width=5)")
    assert teacher.requested_architecture == "nets.py:Sized(width=5)"
    assert loaded(nets().Sized(16), "nets.py:Sized", ContractFields(input_size=(3, 16, 16))).contract.num_classes == 10
    with pytest.raises(DfadcError, match="no argument 'widht'") as caught:
        loaded(nets().Sized(width=5), "nets.py:Sized(widht=5)")
    assert "input_size, width" in caught.value.hint


def test_weights_are_found_under_and_over_a_factorys_prefix() -> None:
    loaded(nets().Lightning(), "nets.py:Lightning")
    torch.save(nets().Lightning().model.state_dict(), "t.pt")
    teacher = load_teacher("t.pt", architecture="nets.py:Lightning", fields=RGB)
    assert teacher.contract.num_classes == 7
    loaded(nets().Lightning(), "nets.py:TwoHeads")


def test_a_whole_network_of_a_script_loads_by_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nets().TwoHeads(5).eval()
    monkeypatch.setattr(type(network), "__module__", "__main__")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "TwoHeads", type(network), raising=False)
    torch.save(network, "t.pt")
    monkeypatch.delattr(main, "TwoHeads")
    for trust in (False, True):
        teacher = load_teacher("t.pt", architecture="nets.py:TwoHeads", fields=RGB, trust=trust)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(teacher.module(images), network(images))
    with pytest.raises(DfadcError, match="needs code that is not here") as caught:
        load_teacher("t.pt", fields=RGB, trust=True)
    assert "--teacher-arch file.py:Net" in caught.value.hint


def test_an_architecture_beside_a_whole_network_gets_its_weights() -> None:
    network = squeezenet1_1(num_classes=5).eval()
    torch.save(network, "t.pt")
    teacher = load_teacher("t.pt", architecture="squeezenet1_1", fields=RGB)
    assert any("its weights were put into squeezenet1_1" in note for note in teacher.notes)
    with pytest.raises(DfadcError, match="do not fit torchvision:squeezenet1_0"):
        load_teacher("t.pt", architecture="squeezenet1_0", fields=RGB)


def test_a_run_of_the_command_with_arch_arg() -> None:
    torch.save(nets().Sized(width=5).state_dict(), "t.pt")
    flags = ("--teacher-arch", "nets.py:Sized", "--arch-arg", "width=5", "--input-size", "3x32x32")
    outcome = run_command("inspect", "t.pt", *flags)
    assert outcome.code == 0, outcome.err
    assert "nets.py:Sized(width=5)" in outcome.out


# ----------------------------------------------------------------------------------------------------- classifiers


def test_a_new_classifier_of_one_linear_layer_is_matched() -> None:
    network = mobilenet_v3_small(num_classes=4)
    network.classifier[3] = nn.Sequential(nn.Dropout(0.2), nn.Linear(1024, 6))
    teacher = loaded(network)
    assert teacher.architecture == "torchvision:mobilenet_v3_small"
    assert teacher.contract.num_classes == 6
    assert any("its classifier classifier.3 is the file's own: 1024 -> 6" in note for note in teacher.notes)


@pytest.mark.parametrize("activation", ["relu", "tanh", "none"])
def test_the_activation_of_a_new_classifier_is_asked_for(activation: str) -> None:
    """Weights do not tell it, and another one would be another teacher in silence."""
    layer = {"relu": nn.ReLU, "tanh": nn.Tanh, "none": nn.Identity}[activation]()
    network = mobilenet_v3_small(num_classes=4)
    norm = nn.BatchNorm1d(8)
    assert norm.running_mean is not None
    norm.running_mean.add_(0.5)
    network.classifier = nn.Sequential(nn.Linear(576, 8), norm, layer, nn.Dropout(), nn.Linear(8, 3))
    torch.save(network.state_dict(), "t.pt")
    with pytest.raises(DfadcError, match="several linear layers as classifier") as caught:
        load_teacher("t.pt", fields=RGB)
    assert "--teacher-arch torchvision:mobilenet_v3_small --arch-arg activation=relu" in caught.value.hint
    loaded(network, f"torchvision:mobilenet_v3_small(activation={activation!r})")


def test_an_unknown_activation_is_refused() -> None:
    torch.save(squeezenet1_1(num_classes=4).state_dict(), "t.pt")
    with pytest.raises(DfadcError, match="unknown activation 'rely'"):
        load_teacher("t.pt", architecture="squeezenet1_1(activation='rely')", fields=RGB)


def test_a_head_beside_a_backbone_is_one_network() -> None:
    whole = mobilenet_v3_small(num_classes=4).eval()
    for head in ("head", "head.fc", "classifier"):
        weights = {
            key.replace("classifier.3", head) if key.startswith("classifier.3") else f"backbone.{key}": tensor
            for key, tensor in whole.state_dict().items()
        }
        torch.save({"state_dict": weights, "meta": {"CLASSES": list("abcd")}}, "t.pt")
        teacher = load_teacher("t.pt", fields=RGB)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(teacher.module(images), whole(images))
        assert teacher.contract.class_names == tuple("abcd")
        assert any(f"backbone.* and {head}.* taken for one network" in note for note in teacher.notes)


def test_one_logit_is_asked_about_before_the_size_is_asked() -> None:
    torch.save(squeezenet1_1(num_classes=1).state_dict(), "t.pt")
    with pytest.raises(DfadcError, match="num_classes = 1") as caught:
        load_teacher("t.pt")
    assert "--num-classes 2" in caught.value.hint


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_two_classes_of_one_logit(name: str) -> None:
    network = get_model(name, num_classes=1).eval()
    torch.save(network.state_dict(), "t.pt")
    teacher = load_teacher("t.pt", fields=ContractFields(input_size=(3, 64, 64), num_classes=2))
    images = torch.randn(2, 3, 64, 64)
    logits = network(images).detach()
    torch.testing.assert_close(teacher.module(images), torch.cat([torch.zeros_like(logits), logits], 1))
    assert teacher.contract.num_classes == 2
    assert any("[0, z]" in note for note in teacher.warnings)


# ----------------------------------------------------------------------------------------- stems, inputs, positions


def small_stem(*, pooled: bool) -> nn.Module:
    network = resnet18(num_classes=3)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    if not pooled:
        network.maxpool = nn.Identity()
    made: nn.Module = network
    return made


@pytest.mark.parametrize("pooled", [True, False])
def test_a_small_stem_with_and_without_pooling_are_two_networks(pooled: bool) -> None:
    network = small_stem(pooled=pooled)
    stem = "pooled" if pooled else "small"
    teacher = loaded(network, f"resnet18(stem={stem!r})")
    assert teacher.architecture == "torchvision:resnet18"
    with pytest.raises(DfadcError, match="fit two networks") as caught:
        load_teacher("t.pt", fields=RGB)
    assert "--teacher-arch torchvision:resnet18 --arch-arg stem=small" in caught.value.hint
    assert "stem=pooled" in caught.value.hint
    Path("t.toml").write_text(f'architecture = "torchvision:resnet18"\nstem = "{stem}"\n')
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_teacher("t.pt", fields=RGB).module(images), network.eval()(images))


def test_a_stem_of_four_channels() -> None:
    network = squeezenet1_1(num_classes=4)
    network.features[0] = nn.Conv2d(4, 64, 3, 2)
    teacher = loaded(network, fields=ContractFields(input_size=(4, 48, 64)))
    assert teacher.contract.mean is None


def test_the_positional_embedding_states_the_size() -> None:
    network = VisionTransformer(48, 16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072, num_classes=3)
    torch.save(network.state_dict(), "t.pt")
    teacher = load_teacher("t.pt")
    assert teacher.architecture == "torchvision:vit_b_16"
    assert teacher.contract.input_size == (3, 48, 48)
    assert teacher.contract_sources["input_size"] == "positional embedding of the weights"
    with pytest.raises(DfadcError, match="does not fit the positional embedding") as caught:
        load_teacher("t.pt", fields=RGB)
    assert "--input-size 3x48x48" in caught.value.hint


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_that_transforms_its_input_is_not_normalised_twice() -> None:
    network = googlenet(num_classes=4, init_weights=False, aux_logits=False)
    torch.save(network.state_dict(), "t.pt")
    assert load_teacher("t.pt", fields=RGB).contract.mean == (0.5, 0.5, 0.5)
    network.transform_input = True
    torch.save(network, "t.pt")
    assert load_teacher("t.pt", fields=RGB).contract.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_timms_networks_are_matched_by_shapes(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model(name, num_classes=5).state_dict(), "t.pt")
    teacher = load_teacher("t.pt", fields=ContractFields(input_size=(3, 224, 224)))
    assert teacher.architecture == f"timm:{name}"


def test_timms_networks_of_the_same_shapes_are_named_and_refused() -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("tf_efficientnet_lite0", num_classes=5).state_dict(), "t.pt")
    with pytest.raises(DfadcError, match="several architectures: timm:efficientnet_lite0, timm:tf_efficientnet_lite0"):
        load_teacher("t.pt", fields=RGB)


def test_channels_last_and_whole_pixels_are_recognised() -> None:
    torch.save(squeezenet1_1(num_classes=4).state_dict(), "t.pt")
    outcome = run_command("inspect", "t.pt", "--input-size", "224x224x3")
    assert outcome.code == 2
    assert "channels last" in outcome.errors[0]
    assert "--input-size 3x224x224" in outcome.hints[0]
    assert run_command("inspect", "t.pt", "--input-size", "3×64×64").code == 0
    mean = ("--input-size", "3x64x64", "--mean", "123.7,116.3,103.5", "--std", "58.4,57.1,57.4")
    outcome = run_command("inspect", "t.pt", *mean)
    assert outcome.code == 2
    assert "divide the mean and std by 255" in outcome.hints[0]


_FAMILIES = ("shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5")
_LARGE_FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("mobilenet_v2", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "vgg11_bn", "wide_resnet50_2"),
)


@pytest.mark.parametrize(
    "name", [*_FAMILIES, *(pytest.param(each, marks=pytest.mark.slow) for each in _LARGE_FAMILIES)]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_networks_that_are_tried_once_need_no_adaptation(name: str) -> None:
    assert f"torchvision:{name}".startswith(KNOWN_FAMILIES)
    contract = ImageContract((3, 96, 96), 5)
    network = freeze_(build_architecture(f"torchvision:{name}", contract).module)
    tried = adapt(network, random_images(contract), "it", learns=False)
    assert tried.notes == ()
    assert tried.module is network
    assert tried.has_gradient


# ----------------------------------------------------------------------------------------------- what nobody states


def test_a_missing_size_comes_with_commands_to_paste() -> None:
    torch.save(nets().Flat().state_dict(), "t.pt")
    with pytest.raises(DfadcError, match="input size of the teacher is unknown") as caught:
        load_teacher("t.pt", architecture="nets.py:Flat")
    assert "`dfadc inspect t.pt --teacher-arch nets.py:Flat --input-size 1x28x28`" in caught.value.hint
    torch.save(squeezenet1_1(num_classes=4).state_dict(), "t.pt")
    with pytest.raises(DfadcError, match="input size of the teacher is unknown") as caught:
        load_teacher("t.pt")
    assert "`dfadc inspect t.pt --input-size 3x224x224` (documented for torchvision:squeezenet1_1)" in caught.value.hint


PUBLISHED = """
import timm, torch, torchvision
from torch import nn
from torch.hub import load_state_dict_from_url


class OfTorchvision(nn.Module):
    def __init__(self, pretrained=True):
        super().__init__()
        weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT if pretrained else None
        self.model = torchvision.models.squeezenet1_1(weights=weights)
        self.model.classifier[1] = nn.Conv2d(512, 4, 1).cuda()
        self.scale = torch.ones(1).cuda()

    def forward(self, x):
        return self.scale * self.model(x)


class OfTimm(nn.Module):
    def __init__(self, name="mobilenetv3_small_050", pretrained=True):
        super().__init__()
        self.model = timm.create_model(name, pretrained=pretrained, num_classes=4)

    def forward(self, x):
        return self.model(x)


class OfItsOwn(OfTimm):
    def __init__(self, pretrained=True):
        super().__init__(pretrained=False)
        if pretrained:
            weights = load_state_dict_from_url("https://nowhere.invalid/net.pth")
            weights.pop("model.classifier.weight")
            self.load_state_dict(weights)
"""


@pytest.mark.parametrize("name", ["OfTorchvision", "OfTimm", "OfItsOwn"])
@pytest.mark.filterwarnings("ignore")
def test_published_weights_of_a_constructor_are_not_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's weights would overwrite them, and without network fetching them fails or hangs."""
    pytest.importorskip("timm")
    Path("published.py").write_text(PUBLISHED)
    monkeypatch.delitem(sys.modules, "published", raising=False)
    from dfadc.networks.factory import import_file

    with monkeypatch.context() as patched, torch.random.fork_rng():
        patched.setattr(Tensor, "cuda", lambda self: self)
        patched.setattr(nn.Module, "cuda", lambda self: self)
        torch.manual_seed(0)
        network = getattr(import_file(Path("published.py")), name)(pretrained=False).eval()
    before = nn.Module.load_state_dict, nn.Module.cuda, Tensor.cuda, torch.hub.load_state_dict_from_url
    torch.save(network.state_dict(), "t.pt")
    teacher = load_teacher("t.pt", architecture=f"published.py:{name}", fields=RGB)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher.module(images), network(images))
    assert before == (nn.Module.load_state_dict, nn.Module.cuda, Tensor.cuda, torch.hub.load_state_dict_from_url)


def test_a_file_of_a_package_may_import_its_neighbours() -> None:
    Path("zoo_of_mine").mkdir()
    Path("zoo_of_mine/__init__.py").write_text("from .small import Small\n")
    Path("zoo_of_mine/blocks.py").write_text("from torch import nn\nLayer = nn.Conv2d\n")
    code = "from torch import nn\nfrom .blocks import Layer\n\n\ndef Small(n_classes=3):\n"
    code += "    return nn.Sequential(Layer(3, n_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    Path("zoo_of_mine/small.py").write_text(code)
    network = nn.Sequential(nn.Conv2d(3, 7, 3))
    torch.save(network.state_dict(), "t.pt")
    assert load_teacher("t.pt", architecture="zoo_of_mine/small.py:Small", fields=RGB).contract.num_classes == 7


def test_a_factory_that_needs_a_size_is_tried_at_usual_ones() -> None:
    torch.save(nets().Sized(24).state_dict(), "t.pt")
    with Path("nets.py").open("a") as file:
        file.write("\n\ndef needs_size(input_size):\n    return Sized(input_size[1])\n")
    with pytest.raises(DfadcError, match=r"nets\.py:needs_size needs it") as caught:
        load_teacher("t.pt", architecture="nets.py:needs_size")
    assert caught.value.hint.count("--input-size") == 1
    assert "--input-size 3x24x24` (the weights fit it)" in caught.value.hint


def test_a_wrong_name_in_a_file_is_answered_with_the_near_ones() -> None:
    torch.save(nets().Sized().state_dict(), "t.pt")
    with pytest.raises(DfadcError, match="no callable 'Size'") as caught:
        load_teacher("t.pt", architecture="nets.py:Size", fields=RGB)
    assert "nets.py:Sized" in caught.value.hint
    with pytest.raises(DfadcError, match="is a file, not an architecture") as caught:
        load_teacher("t.pt", architecture="nets.py", fields=RGB)
    assert "nets.py:Flat | nets.py:TwoHeads" in caught.value.hint


def test_a_whole_network_of_an_unknown_class_names_it() -> None:
    torch.save(nets().Cosine(4), "t.pt")
    with pytest.raises(DfadcError, match="fit no torchvision classifier") as caught:
        load_teacher("t.pt", fields=RGB)
    assert "--teacher-arch file.py:Cosine" in caught.value.hint
    assert "--trust-teacher" in caught.value.hint


def test_a_sidecar_is_started_with_what_is_known() -> None:
    torch.save(squeezenet1_1(num_classes=4).state_dict(), "t.pt")
    outcome = run_command("inspect", "t.pt", "--write-sidecar")
    assert outcome.code == 0, outcome.err
    assert "sidecar: t.toml" in outcome.err
    text = Path("t.toml").read_text()
    assert 'architecture = "torchvision:squeezenet1_1"' in text
    assert "# input_size = [3, 224, 224]  # unknown" in text
    assert "# mean = [0.485, 0.456, 0.406]  # torchvision weights of squeezenet1_1 (assumed" in text
    Path("t.toml").write_text(
        text.replace("# input_size", "input_size").replace("# mean", "mean").replace("# std", "std")
    )
    teacher = load_teacher("t.pt")
    assert teacher.contract.input_size == (3, 224, 224)
    assert teacher.contract_sources["mean"] == "t.toml"
    assert "there is a sidecar" in run_command("inspect", "t.pt", "--write-sidecar").errors[0]


def test_inspect_of_unknown_weights_shows_them_and_exits_2() -> None:
    torch.save({f"net.{key}": tensor for key, tensor in nets().Flat().state_dict().items()}, "t.pt")
    outcome = run_command("inspect", "t.pt")
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert "net.fc.weight 10x1352" in outcome.out
    assert "prefixes: net.* 4" in outcome.out
    assert (outcome.out + outcome.err).count("fit no torchvision classifier") == 1
    report = inspect_teacher("t.pt")
    assert report.problem is not None
    network = resnet18(num_classes=3)
    network.extra = nn.Linear(2, 2)
    torch.save(network.state_dict(), "t.pt")
    with pytest.raises(DfadcError, match="near are torchvision:resnet18"):
        load_teacher("t.pt", fields=RGB)


def test_a_backbone_with_a_classifier_of_its_own_is_not_joined_with_a_head() -> None:
    """The head would stand for it in silence."""
    network = mobilenet_v3_small(num_classes=1024)
    weights = {f"backbone.{key}": tensor for key, tensor in network.state_dict().items()}
    torch.save(weights | {"head.weight": torch.zeros(3, 1024), "head.bias": torch.zeros(3)}, "t.pt")
    with pytest.raises(DfadcError, match=r"head\.weight, head\.bias would be lost"):
        load_teacher("t.pt", fields=RGB)
