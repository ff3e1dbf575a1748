from __future__ import annotations

import hashlib
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model, mobilenet_v3_small, resnet18, squeezenet1_1

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import save_network
from dfadc.networks.zoo.resnet_8x import resnet34_8x
from dfadc.teacher.identity import choose_match
from dfadc.teacher.load import inspect_teacher, load_teacher
from dfadc.teacher.match import Identity, match_architecture

if TYPE_CHECKING:
    from pathlib import Path

RGB = ContractFields(input_size=(3, 32, 32))
GREY = ContractFields(input_size=(1, 28, 28))


def _saved(value: Any, folder: Path) -> Path:
    path = folder / "weights.pt"
    torch.save(value, path)
    return path


class Odd(nn.Module):
    """A teacher whose outputs are odd in one way."""

    def __init__(self, way: str, num_classes: int = 3) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(3, num_classes, 3)

    def forward(self, images: Tensor) -> Any:
        logits = self.conv(images).mean((2, 3))
        if self.way == "dense":
            return {"out": self.conv(images)}
        if self.way == "no gradient":
            return logits.detach()
        return {
            "log-probabilities": logits.log_softmax(1),
            "nan": logits * float("nan"),
            "constant": logits * 0 - 1,
            "dict": {"logits": logits},
            "vector": logits.sum(1),
            "matrix": logits[:, :, None].expand(-1, -1, 4),
        }.get(self.way, logits)


def test_bare_state_dict_of_a_torchvision_network_needs_the_size_alone(tmp_path: Path) -> None:
    network = mobilenet_v3_small(num_classes=7).eval()
    path = _saved(network.state_dict(), tmp_path)
    teacher = load_teacher(path, fields=RGB)
    assert teacher.architecture == "torchvision:mobilenet_v3_small"
    assert teacher.contract.num_classes == 7
    assert teacher.contract.mean == (0.485, 0.456, 0.406)
    assert "assumed" in teacher.contract_sources["mean"]
    assert teacher.contract_sources["num_classes"] == "shapes of the weights"
    assert teacher.contract_sources["input_size"] == "command line"
    assert teacher.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert teacher.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    assert len(teacher.batch_norms) == sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher.module(images), network(images))


def test_teacher_is_frozen_and_gives_gradients_to_images(tmp_path: Path) -> None:
    teacher = load_teacher(
        _saved(build_architecture("lenet5", ImageContract((1, 28, 28), 4)).module.state_dict(), tmp_path), fields=GREY
    )
    assert not any(module.training for module in teacher.module.modules())
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    images = torch.randn(2, 1, 28, 28, requires_grad=True)
    teacher.module(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert teacher.contract.mean is None


def test_loading_leaves_the_random_state_of_the_dry_run_alone(tmp_path: Path) -> None:
    """The images of the dry run come from a generator of their own."""
    path = _saved(squeezenet1_1(num_classes=3), tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load_teacher(path, fields=RGB)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("lenet5_half", "default"),
        ("wrn_16_1", "default"),
        ("wrn_22_3", "default"),
        ("compact_resnet_20", "default"),
        ("resnet18_8x", "default"),
        ("torchvision:resnet18", "small"),
        ("torchvision:resnet18", "default"),
        ("torchvision:squeezenet1_1", "default"),
        ("torchvision:shufflenet_v2_x0_5", "default"),
        ("torchvision:regnet_x_400mf", "default"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_are_matched_by_names_and_shapes(name: str, stem: Any, channels: int) -> None:
    built = build_architecture(name, ImageContract((channels, 28, 28), 6), stem=stem)
    assert match_architecture(built.module.state_dict()) == [Identity(name, stem, channels, 6)]


def test_weights_with_training_only_classifiers_match(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's slow truncated normal, announced by torchvision
        network = get_model("googlenet", num_classes=5, init_weights=False)
    teacher = load_teacher(_saved(network.state_dict(), tmp_path), fields=RGB)
    assert teacher.architecture == "torchvision:googlenet"
    assert teacher.contract.num_classes == 5


def test_no_match_and_several(tmp_path: Path) -> None:
    path = _saved({"layer.weight": torch.ones(3, 4), "layer.bias": torch.ones(3)}, tmp_path)
    with pytest.raises(DfadcError, match="fit no torchvision classifier") as caught:
        load_teacher(path, fields=RGB)
    assert "--teacher-arch" in caught.value.hint
    several = [Identity("first", "default", 3, 10), Identity("second", "default", 3, 10)]
    with pytest.raises(DfadcError, match="several architectures: first, second"):
        choose_match(several, path)


def test_wrong_architecture_names_what_is_missing(tmp_path: Path) -> None:
    path = _saved(resnet18(num_classes=3).state_dict(), tmp_path)
    with pytest.raises(DfadcError, match=r"80 missing \(layer1\.2\.conv1\.weight"):
        load_teacher(path, architecture="torchvision:resnet34", fields=RGB)
    deeper = _saved(resnet34_8x(ImageContract((3, 32, 32), 3)).state_dict(), tmp_path)
    with pytest.raises(DfadcError, match=r"96 unexpected"):
        load_teacher(deeper, architecture="resnet18_8x", fields=RGB)
    path = _saved(resnet18(num_classes=3).state_dict(), tmp_path)
    with pytest.raises(DfadcError, match=r"165 missing .*; 24 of another shape"):
        load_teacher(path, architecture="torchvision:resnet50", fields=RGB)


def test_unknown_size_says_who_was_asked(tmp_path: Path) -> None:
    path = _saved(squeezenet1_1(num_classes=7).state_dict(), tmp_path)
    with pytest.raises(DfadcError, match=r"3x224x224, but only for its own weights of 1000 classes") as caught:
        load_teacher(path)
    assert "teacher.toml" in caught.value.message
    assert "--input-size" in caught.value.hint


def test_documented_weights_need_nothing(tmp_path: Path) -> None:
    teacher = load_teacher(_saved(squeezenet1_1().state_dict(), tmp_path))
    assert teacher.contract.input_size == (3, 224, 224)
    assert teacher.contract.class_names is not None
    assert "torchvision weights of squeezenet1_1" in teacher.contract_sources["input_size"]


def test_contradictions_with_the_weights_are_refused(tmp_path: Path) -> None:
    path = _saved(squeezenet1_1(num_classes=7).state_dict(), tmp_path)
    with pytest.raises(DfadcError, match="1 channels, but the first layer of the weights takes 3"):
        load_teacher(path, fields=GREY)
    with pytest.raises(DfadcError, match=r"9 classes \(command line\), but the last layer of the weights has 7"):
        load_teacher(path, fields=ContractFields(input_size=(3, 64, 64), num_classes=9))
    with pytest.raises(DfadcError, match="num_classes = 1"):
        load_teacher(_saved(squeezenet1_1(num_classes=1).state_dict(), tmp_path), fields=RGB)


def test_flags_beat_metadata_beats_sidecar(tmp_path: Path) -> None:
    contract = ImageContract((1, 28, 28), 4, mean=(0.1,), std=(0.2,))
    built = build_architecture("lenet5", contract)
    path = tmp_path / "teacher.safetensors"
    save_network(path, built.module, architecture=built.name, stem=built.stem, contract=contract)
    plain = load_teacher(path)
    assert plain.contract == contract
    assert plain.contract_sources["mean"] == "metadata of the file"
    (tmp_path / "teacher.toml").write_text('mean = [0.9]\nstd = [0.9]\nclass_names = ["a", "b", "c", "d"]\n')
    beside = load_teacher(path, fields=ContractFields(mean=(0.5,), std=(0.6,)))
    assert beside.contract.mean == (0.5,)
    assert beside.contract.class_names == ("a", "b", "c", "d")
    assert beside.contract_sources["class_names"] == "teacher.toml"


def test_sidecar_completes_a_bare_state_dict(tmp_path: Path) -> None:
    built = build_architecture("torchvision:mobilenet_v2", ImageContract((3, 32, 32), 4), stem="small")
    path = _saved(built.module.state_dict(), tmp_path)
    sidecar = tmp_path / "weights.toml"
    sidecar.write_text('architecture = "torchvision:mobilenet_v2"\nstem = "small"\ninput_size = [3, 32, 32]\n')
    teacher = load_teacher(path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher.module(images), built.module.eval()(images))
    assert teacher.contract_sources["input_size"] == "weights.toml"
    sidecar.write_text('architecture = "os:system"\n')
    with pytest.raises(DfadcError, match="would import code"):
        load_teacher(path)
    sidecar.write_text("size = 3\n")
    with pytest.raises(DfadcError, match=r"weights\.toml: unknown contract field 'size'"):
        load_teacher(path)


def test_safetensors_with_our_contract_but_no_architecture(tmp_path: Path) -> None:
    contract = ImageContract((3, 32, 32), 5)
    path = tmp_path / "plain.safetensors"
    save_file(squeezenet1_1(num_classes=5).state_dict(), path, metadata={"dfadc.contract": contract.to_json()})
    teacher = load_teacher(path)
    assert teacher.architecture == "torchvision:squeezenet1_1"
    assert teacher.contract.input_size == (3, 32, 32)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("nan", "not finite"),
        ("no gradient", "no gradient flows"),
        ("vector", "one output for an image"),
        ("matrix", "have shape"),
    ],
)
def test_odd_outputs_are_refused(way: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match=message) as caught:
        load_teacher(_saved(Odd(way), tmp_path), fields=RGB, trust=True)
    assert caught.value.exit_code == 2


def test_odd_outputs_that_may_be_right_are_warned_about(tmp_path: Path) -> None:
    constant = load_teacher(_saved(Odd("constant"), tmp_path), fields=RGB, trust=True)
    assert any("same outputs" in warning for warning in constant.warnings)
    logs = load_teacher(_saved(Odd("log-probabilities"), tmp_path), fields=RGB, trust=True)
    assert any("log-probabilities, which are logits" in warning for warning in logs.warnings)


def test_dicts_are_unwrapped_and_dense_logits_are_segmentation(tmp_path: Path) -> None:
    plain = load_teacher(_saved(Odd("dict"), tmp_path), fields=RGB, trust=True)
    assert plain.module(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert plain.contract.num_classes == 3
    dense = load_teacher(_saved(Odd("dense"), tmp_path), fields=RGB, trust=True)
    assert dense.contract.task == "segmentation"


@pytest.mark.parametrize("kind", ["script", "exported"])
def test_code_kinds_need_trust_and_then_teach(kind: str, tmp_path: Path) -> None:
    network = squeezenet1_1(num_classes=6).eval()
    path = tmp_path / "teacher.pt"
    if kind == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates TorchScript
            torch.jit.save(torch.jit.script(network), path)
        fields = RGB
    else:
        dynamic = {"x": {0: torch.export.Dim("batch")}}
        torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=dynamic), path)
        fields = ContractFields()
    with pytest.raises(DfadcError, match="which is code"):
        load_teacher(path, fields=fields)
    teacher = load_teacher(path, fields=fields, trust=True)
    assert teacher.contract.input_size == (3, 32, 32)
    assert teacher.contract.num_classes == 6
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    images = torch.randn(5, 3, 32, 32, requires_grad=True)
    logits = teacher.module(images)
    torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_a_factory_of_the_user_builds_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_teacher_code.py").write_text(
        "from torch import nn\n"
        "def tiny(num_classes, channels=3):\n"
        "    layers = nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)\n"
        "    return nn.Sequential(*layers)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8))
    teacher = load_teacher(_saved(network.state_dict(), tmp_path), architecture="my_teacher_code:tiny", fields=GREY)
    assert teacher.contract.num_classes == 8
    assert teacher.architecture == "my_teacher_code:tiny"


def test_inspect_shows_what_load_finds(tmp_path: Path) -> None:
    path = _saved({"model": mobilenet_v3_small(num_classes=7).state_dict()}, tmp_path)
    report = inspect_teacher(path, fields=RGB)
    teacher = load_teacher(path, fields=RGB)
    assert report.architecture == teacher.architecture
    assert report.num_parameters == teacher.num_parameters
    assert report.norm_layers == teacher.norm_layers
    assert report.contract["num_classes"] == 7
    assert isinstance(report.flops, int)
    assert report.flops > 1e6
    assert json.loads(json.dumps(report.to_dict()))["sha256"] == teacher.sha256


def test_inspect_says_why_something_is_unknown(tmp_path: Path) -> None:
    path = _saved(squeezenet1_1(num_classes=7).state_dict(), tmp_path)
    report = inspect_teacher(path)
    assert report.architecture == "torchvision:squeezenet1_1"
    assert report.num_parameters == sum(p.numel() for p in squeezenet1_1(num_classes=7).parameters())
    assert str(report.contract["input_size"]).startswith("unknown, because ")
    assert str(report.flops).startswith("unknown, because the input size")


def test_inspect_runs_no_code_and_never_fails_on_known_kinds(tmp_path: Path) -> None:
    script = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    engine, text = tmp_path / "a.engine", tmp_path / "b.pt"
    engine.write_bytes(b"ptrt" + bytes(100))
    text.write_text("hello")
    foreign = _saved(Odd("dict"), tmp_path)
    for path in (script, engine, text, foreign):
        report = inspect_teacher(path)
        assert str(report.architecture).startswith("unknown, because ")
        json.dumps(report.to_dict())
    assert any("Odd" in name for name in inspect_teacher(foreign).foreign_globals)
    assert "--trust-teacher" in inspect_teacher(script).safety


def test_a_wrong_value_range_is_said_with_its_likely_cause(tmp_path: Path) -> None:
    """Its batch norm remembers pixels of 0..255."""
    torch.manual_seed(0)
    network = mobilenet_v3_small(num_classes=3)
    network.train()
    with torch.no_grad():
        for _ in range(40):
            network(255 * torch.rand(4, 3, 32, 32))
    path = _saved(network.eval().state_dict(), tmp_path)
    wrong = load_teacher(path, fields=RGB)
    assert any("if the teacher takes pixels of 0..255" in warning for warning in wrong.warnings)
    scale = (1 / 255,) * 3
    right = load_teacher(path, fields=ContractFields(input_size=(3, 32, 32), mean=(0.0,) * 3, std=scale))
    assert not any("0..255" in warning for warning in right.warnings)


def test_wild_logits_are_said(tmp_path: Path) -> None:
    network = squeezenet1_1(num_classes=3)
    with torch.no_grad():
        network.classifier[1].weight.mul_(1e6)
    teacher = load_teacher(_saved(network.state_dict(), tmp_path), fields=RGB)
    assert any("--mean, --std or the value range may be wrong" in warning for warning in teacher.warnings)
