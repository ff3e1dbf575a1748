"""Keras teachers: whole networks of Keras 3 as .keras and .h5."""

from __future__ import annotations

import json
import os
import sys
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from command_line import run_command, settings
from conftest import QUICK_RECIPE
from torch import Tensor

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError, RequirementMissing
from dfadc.teacher.load import inspect_teacher, load_teacher

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("h5py")
os.environ["KERAS_BACKEND"] = "torch"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras")

SIZE = (8, 8, 1)


def build(*, first: Any = (), last: str | None = "softmax", size: Any = SIZE) -> Any:
    """A small network with a batch norm whose statistics are those of no fresh one."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    head = [layers.GlobalAveragePooling2D(), layers.Dense(5, activation=last)]
    body = [layers.Conv2D(6, 3, strides=2, padding="same"), layers.BatchNormalization(name="norm"), layers.ReLU()]
    with keras.device("cpu"):
        network = keras.Sequential([keras.Input(size), *first, *body, *head])
        mean, variance = (torch.linspace(low, high, 6) for low, high in ((-0.1, 0.2), (0.5, 2)))
        network.get_layer("norm").moving_mean.assign(mean)
        network.get_layer("norm").moving_variance.assign(variance)
    return network


def save(network: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.save(path)
    return path


def outputs_of(network: Any, images: Tensor) -> Tensor:
    """Outputs for images (N, C, H, W)."""
    with keras.device("cpu"):
        outputs: Tensor = network(images.permute(0, 2, 3, 1), training=False)
    return outputs.detach()


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_keras_file_teaches(suffix: str, tmp_path: Path) -> None:
    network = build()
    path = save(network, tmp_path / f"teacher.{suffix}")
    teacher = load_teacher(path)
    assert teacher.architecture == "Keras network"
    assert teacher.contract.input_size == (1, 8, 8)
    assert teacher.contract.num_classes == 5
    assert any("the last softmax was taken off" in note for note in teacher.notes)
    images = torch.rand(3, 1, 8, 8, requires_grad=True)
    logits = teacher.logits(images)
    torch.testing.assert_close(logits.softmax(1), outputs_of(network, images))
    logits.square().sum().backward()
    assert images.grad is not None
    assert bool(images.grad.any())


def test_one_of_several_outputs(tmp_path: Path) -> None:
    with keras.device("cpu"):
        images = keras.Input(SIZE)
        maps = keras.layers.Conv2D(6, 3)(images)
        pooled = keras.layers.GlobalAveragePooling2D()(maps)
        heads = [keras.layers.Dense(size, name=f"head_{size}", activation="softmax")(pooled) for size in (3, 4)]
        network = keras.Model(images, heads)
    path = save(network, tmp_path / "teacher.keras")
    with pytest.raises(DfadcError, match=r"several outputs that may be logits: 0 \(2, 3\), 1 \(2, 4\)"):
        load_teacher(path)
    batch = torch.rand(2, 1, 8, 8)
    with keras.device("cpu"):
        wanted = network(batch.permute(0, 2, 3, 1))[1].detach()
    torch.testing.assert_close(load_teacher(path, output="1").logits(batch).softmax(1), wanted)


@pytest.mark.parametrize(("classes", "last"), [(3, "softmax"), (1, "sigmoid")])
def test_maps_of_pixels_are_turned(classes: int, last: str, tmp_path: Path) -> None:
    """Keras gives them as (N, H, W, K)."""
    with keras.device("cpu"):
        layers = [keras.Input((8, 10, 1)), keras.layers.Conv2D(classes, 3, padding="same", activation=last)]
        network = keras.Sequential(layers)
    fields = ContractFields(num_classes=2) if classes == 1 else ContractFields()
    teacher = load_teacher(save(network, tmp_path / "teacher.keras"), fields=fields)
    assert (teacher.contract.task, teacher.contract.num_classes) == ("segmentation", max(classes, 2))
    images = torch.rand(2, 1, 8, 10)
    found = teacher.logits(images).softmax(1)[:, -classes:]
    torch.testing.assert_close(found, outputs_of(network, images).permute(0, 3, 1, 2))


def test_batch_norms_are_found_and_watched(tmp_path: Path) -> None:
    teacher = load_teacher(save(build(), tmp_path / "teacher.keras"))
    (norm,) = teacher.batch_norms
    torch.testing.assert_close(norm.running_var, torch.linspace(0.5, 2, 6))
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher.logits(torch.rand(2, 1, 8, 8))
    assert seen[0].shape == (2, 6, 4, 4)
    assert teacher.norm_layers[0].num_channels == 6


@pytest.mark.parametrize(("scale", "std"), [(1 / 255, 1 / 255), (2.0, 1.0)])
def test_rescaling_inside_tells_the_range(scale: float, std: float, tmp_path: Path) -> None:
    network = build(first=[keras.layers.Rescaling(scale)], last=None)
    teacher = load_teacher(save(network, tmp_path / "teacher.keras"))
    assert teacher.contract.mean == (0.0,)
    assert teacher.contract.std == pytest.approx((std,))
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(teacher.logits(images / std), outputs_of(network, images / std))


def test_open_size_is_asked_for(tmp_path: Path) -> None:
    path = save(build(size=(None, None, 3)), tmp_path / "teacher.keras")
    with pytest.raises(DfadcError, match="input size of the teacher is unknown"):
        load_teacher(path)
    assert load_teacher(path, fields=ContractFields(input_size=(3, 12, 10))).contract.num_classes == 5


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_code_in_the_file_needs_trust(suffix: str, tmp_path: Path) -> None:
    doubled = keras.layers.Lambda(lambda images: images * 2, output_shape=SIZE)
    path = save(build(first=[doubled]), tmp_path / f"teacher.{suffix}")
    with pytest.raises(DfadcError, match="holds code: layer Lambda") as caught:
        load_teacher(path)
    assert "--trust-teacher" in caught.value.hint
    assert load_teacher(path, trust=True).contract.num_classes == 5


def test_functions_of_other_modules_are_not_imported(tmp_path: Path) -> None:
    """The archive names any function; Keras before 3.9 imported and called it."""
    path = save(build(), tmp_path / "teacher.keras")
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(contents["config.json"])
    config["config"]["layers"][1]["config"]["activation"] = {"module": "os", "class_name": "system", "config": "true"}
    contents["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    with pytest.raises(DfadcError, match=r"holds code: os\.system"):
        load_teacher(path)


def test_custom_layers_are_named(tmp_path: Path) -> None:
    class Doubled(keras.layers.Layer):  # type: ignore[misc, name-defined]
        def call(self, inputs: Tensor) -> Tensor:
            return inputs * 2

    path = save(build(first=[Doubled()]), tmp_path / "teacher.h5")
    with pytest.raises(DfadcError, match="Doubled") as caught:
        load_teacher(path)
    assert "onnx" in caught.value.hint


def test_weights_alone_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build().save_weights(tmp_path / "teacher.weights.h5")
    with pytest.raises(DfadcError, match="without a Keras architecture") as caught:
        load_teacher(tmp_path / "teacher.weights.h5")
    assert "model.save" in caught.value.hint


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_cut_off_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = save(build(), tmp_path / f"teacher.{suffix}")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DfadcError, match=r"cannot read|damaged"):
        load_teacher(path)


def test_several_inputs_are_refused(tmp_path: Path) -> None:
    images, extra = keras.Input(SIZE), keras.Input((5,))
    network = keras.Model([images, extra], keras.layers.Add()([build()(images), extra]))
    with pytest.raises(DfadcError, match="2 inputs and 1 outputs"):
        load_teacher(save(network, tmp_path / "teacher.keras"))


def test_keras_alone_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(build(), tmp_path / "teacher.keras")
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(RequirementMissing) as caught:
        load_teacher(path)
    assert (caught.value.hint, caught.value.exit_code) == ("pip install 'dfadc[keras]'", 4)
    assert inspect_teacher(path).problem is None


def test_distilling_a_keras_teacher_by_the_command(tmp_path: Path) -> None:
    path = save(build(), tmp_path / "teacher.h5")
    quick = settings({**QUICK_RECIPE, "steps": 2})
    run = tmp_path / "run"
    outcome = run_command("distill", path, "--student", "compact_resnet_4", *quick, "--export", "onnx", "--out", run)
    assert outcome.code in (0, 3), outcome.err
    assert (run / "artifacts" / "student.onnx").is_file()
