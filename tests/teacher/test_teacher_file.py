from __future__ import annotations

import argparse
import os
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18, squeezenet1_1

from dfadc.errors import DfadcError
from dfadc.teacher import file_kind
from dfadc.teacher.file_kind import FileKind, sniff_kind
from dfadc.teacher.read import read_state_dict, read_teacher_file
from dfadc.teacher.safe_globals import find_layer_class

if TYPE_CHECKING:
    from pathlib import Path


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


class OwnNetwork(nn.Module):
    """A network whose code no one else has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def network() -> nn.Module:
    module: nn.Module = squeezenet1_1(num_classes=7)
    return module.eval()


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_of_both_formats(network: nn.Module, tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "teacher.safetensors"  # the suffix is not looked at
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=zipped)
    contents = read_teacher_file(file)
    assert contents.kind is (FileKind.CHECKPOINT if zipped else FileKind.LEGACY_CHECKPOINT)
    assert contents.state_dict is not None
    for name, tensor in network.state_dict().items():
        assert torch.equal(contents.state_dict[name], tensor)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "ema", "teacher"])
def test_checkpoints_are_unwrapped(network: nn.Module, tmp_path: Path, key: str) -> None:
    weights = {f"module._orig_mod.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, key: weights}, tmp_path / "t.pt")
    contents = read_teacher_file(tmp_path / "t.pt")
    assert contents.state_dict is not None
    assert set(contents.state_dict) == set(network.state_dict())
    assert any(key in note for note in contents.notes)


def test_a_checkpoint_without_weights_names_its_keys(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "history": [1.0]}, tmp_path / "t.pt")
    with pytest.raises(DfadcError, match="its keys: epoch, history"):
        read_teacher_file(tmp_path / "t.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_named_and_not_run(network: nn.Module, tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "was_run"
    checkpoint = {"model": network.state_dict(), "extra": Malicious(target)}
    torch.save(checkpoint, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DfadcError, match=r"(posix|nt)\.mkdir") as caught:
        read_teacher_file(tmp_path / "t.pt")
    assert not target.exists()
    assert "--trust-teacher" in caught.value.hint
    # The same file does run where it is trusted, which shows that the test would notice.
    read_teacher_file(tmp_path / "t.pt", trust=True)
    assert target.exists()


def test_foreign_classes_are_inert_and_named(network: nn.Module, tmp_path: Path) -> None:
    torch.save({"model": network.state_dict(), "flags": argparse.Namespace(lr=1)}, tmp_path / "flags.pt")
    contents = read_teacher_file(tmp_path / "flags.pt")
    assert contents.inert == ("argparse.Namespace",)
    assert contents.state_dict is not None
    assert contents.state_dict.keys() == network.state_dict().keys()
    torch.save(OwnNetwork(), tmp_path / "own.pt")
    own = read_teacher_file(tmp_path / "own.pt")
    assert own.module is None
    assert own.state_dict is not None
    assert list(own.state_dict) == ["layer.weight", "layer.bias"]
    assert any("OwnNetwork" in note and "not run" in note for note in own.notes)
    assert isinstance(read_teacher_file(tmp_path / "own.pt", trust=True).module, OwnNetwork)


def _small_transformer(num_classes: int) -> nn.Module:
    module: nn.Module = VisionTransformer(
        32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=num_classes
    )
    return module


@pytest.mark.parametrize("factory", [resnet18, _small_transformer])
def test_whole_library_modules_are_restored_safely(factory: Any, tmp_path: Path) -> None:
    module = factory(num_classes=3)
    torch.save(module, tmp_path / "t.pt")
    contents = read_teacher_file(tmp_path / "t.pt")
    assert contents.module is not None
    assert type(contents.module) is type(module)
    assert set(read_state_dict(tmp_path / "t.pt")) == set(module.state_dict())


def test_timm_modules_are_restored_safely(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("mobilenetv3_small_050", num_classes=3)
    torch.save(module, tmp_path / "t.pt")
    assert type(read_teacher_file(tmp_path / "t.pt").module) is type(module)


def test_only_layer_classes_are_allowed() -> None:
    """A prefix test would admit these functions."""
    names = [
        "torch.hub.load",
        "torch.storage._load_from_bytes",
        "torch.nn.modules.module.Parameter",
        "torch.nn.modules.module.torch",
        "torchvision.models._api.get_model",
        "timm.models._factory.create_model",
        "torch.fx.graph_module.GraphModule",
        "torch.jit._script.ScriptModule",
        "builtins.eval",
        "torchvision.models.no_such_module.Network",
    ]
    assert [name for name in names if find_layer_class(name) is not None] == []
    assert find_layer_class("torch.nn.modules.conv.Conv2d") is nn.Conv2d


def test_legacy_whole_modules_are_restored_safely(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network, tmp_path / "t.pt", _use_new_zipfile_serialization=False)
    module = read_teacher_file(tmp_path / "t.pt").module
    assert module is not None
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(module.eval()(images), network(images))


def _broken_files(network: nn.Module, folder: Path) -> dict[str, tuple[Path, str]]:
    torch.save(network.state_dict(), folder / "whole.pt")
    torch.save(network.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    contents = {
        "truncated zip": ((folder / "whole.pt").read_bytes()[:90_000], "damaged or cut-off"),
        "truncated legacy": ((folder / "legacy.pt").read_bytes()[:90_000], "cannot read"),
        "html": (b"<!DOCTYPE html><html>404", "HTML page"),
        "text": (b"hello, I am a teacher", "text file"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "plain pickle": (b"\x80\x04\x95\x00", "plain Python pickle"),
        "bytes": (bytes(range(200, 240)), "no known kind"),
        "empty": (b"", "empty"),
        "onnx": (b"\x08\x0a\x12\x07pytorch", "its graph is empty"),
        "engine": (b"ptrt\x00\x00\x00\x00", "TensorRT engine"),
        "rtx engine": (b"vtrt\x00\x00\x00\x00", "TensorRT engine"),
    }
    files = {}
    for name, (data, message) in contents.items():
        path = folder / f"{name.replace(' ', '_')}.pt"
        path.write_bytes(data)
        files[name] = (path, message)
    with zipfile.ZipFile(folder / "notes.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    return files | {
        "other zip": (folder / "notes.pt", "no PyTorch file"),
        "missing": (folder / "missing.pt", "there is no file"),
        "folder": (folder, "is a folder"),
    }


def test_broken_and_wrong_files_are_told_apart(network: nn.Module, tmp_path: Path) -> None:
    for name, (path, message) in _broken_files(network, tmp_path).items():
        with pytest.raises(DfadcError, match=message) as caught:
            read_teacher_file(path)
        assert caught.value.hint, name
        assert caught.value.exit_code == 2


def test_archives_are_measured_before_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(20_000_000))
    with pytest.raises(DfadcError, match="times its size"):
        sniff_kind(bomb)
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "large.pt")
    monkeypatch.setattr(file_kind, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(DfadcError, match="GiB"):
        sniff_kind(tmp_path / "large.pt")


def test_real_onnx_files_are_recognised(network: nn.Module, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="test"), tmp_path / "model.pt")
    assert sniff_kind(tmp_path / "model.pt") is FileKind.ONNX
    onnx.save(onnx.helper.make_model(graph), tmp_path / "bare.pt")
    assert sniff_kind(tmp_path / "bare.pt") is FileKind.ONNX
