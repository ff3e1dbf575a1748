"""One network as torch's file, as ONNX and as Keras: its students are equally good on real images."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dfadc
from dfadc.contract import ContractFields
from dfadc.networks.network_file import load_network

if TYPE_CHECKING:
    from conftest import Digits

pytestmark = pytest.mark.slow
FASHION_MNIST = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
#: From random weights: none are inherited from an ONNX or Keras file.
SETTINGS = ("student.inherit=off", "student.hints=0")
#: Steps after which the students of digits are nearly as good as their teacher.
STEPS = 400
#: Share of the images by which the two accuracies may differ.
WITHIN = 0.01


def accuracy(teacher: dfadc.Teacher, student: str, *, steps: int, out: Path, images: Tensor, labels: Tensor) -> float:
    """Accuracy of a student on real images (N, C, H, W), normalised."""
    recipe = dfadc.load_recipe("auto", [*SETTINGS, f"steps={steps}"])
    run = dfadc.run_distillation(teacher, student, out=out, recipe=recipe)
    network = load_network(run.student)[0].eval()
    with torch.no_grad():
        predictions = torch.cat([network(batch).argmax(1) for batch in images.split(200)])
    return float((predictions == labels).double().mean())


def test_an_onnx_file_teaches_as_the_torch_file_does(tmp_path: Path) -> None:
    pytest.importorskip("onnx2fx")
    ours = dfadc.load_teacher(FASHION_MNIST / "teacher_lenet5.safetensors")
    path, contract = tmp_path / "teacher.onnx", ours.contract
    assert contract.mean is not None
    assert contract.std is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "dynamic_axes": axes}
        torch.onnx.export(ours.module, (torch.zeros(1, *contract.input_size),), path, dynamo=False, **names)
    onnx = dfadc.load_teacher(path, fields=ContractFields(mean=contract.mean, std=contract.std))
    with np.load(FASHION_MNIST / "test_2000.npz") as stored:
        pixels, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]).long()
    images = (pixels.float() / 255 - contract.mean[0]) / contract.std[0]
    found = [
        accuracy(each, "lenet5_half", steps=300, out=tmp_path / str(each.kind), images=images, labels=labels)
        for each in (ours, onnx)
    ]
    assert found[0] > 0.5
    assert abs(found[0] - found[1]) <= WITHIN, found


class DigitsNetwork(nn.Sequential):
    """A small classifier of (1, 8, 8) digits that Keras can express to the last number."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
            blocks += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU()]
            blocks += [nn.MaxPool2d(2)] if outputs == 64 else []
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def in_keras(network: DigitsNetwork, keras: Any) -> Any:
    """The same network with the same weights; a softmax ends it, as usual there."""
    layers: list[Any] = [keras.Input((8, 8, 1))]
    weights: list[Any] = []
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            layers.append(keras.layers.Conv2D(layer.out_channels, 3, padding="same"))
            weights += [layer.weight.permute(2, 3, 1, 0), layer.bias]
        elif isinstance(layer, nn.BatchNorm2d):
            layers.append(keras.layers.BatchNormalization(epsilon=1e-3))
            weights += [layer.weight, layer.bias, layer.running_mean, layer.running_var]
        elif isinstance(layer, nn.ReLU):
            layers.append(keras.layers.ReLU())
        elif isinstance(layer, nn.MaxPool2d):
            layers.append(keras.layers.MaxPooling2D(2))
        elif isinstance(layer, nn.Linear):
            layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, activation="softmax")]
            weights += [layer.weight.T, layer.bias]
    with keras.device("cpu"):
        model = keras.Sequential(layers)
        model.set_weights([tensor.detach().numpy() for tensor in weights])
    return model


def trained(train: Digits) -> DigitsNetwork:
    """The network, trained on real digits with a fixed seed."""
    torch.manual_seed(0)
    network, labels = DigitsNetwork(), torch.from_numpy(train.labels)
    images = torch.from_numpy(train.images).float() / 255
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(15):
        for part in torch.randperm(len(images)).split(64):
            loss = functional.cross_entropy(network(images[part]), labels[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return network.eval()


def test_keras_files_teach_as_the_torch_file_does(digits_split: tuple[Digits, Digits], tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    os.environ["KERAS_BACKEND"] = "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras = pytest.importorskip("keras")
        network = trained(digits_split[0])
        model = in_keras(network, keras)
        paths = [tmp_path / "teacher.keras", tmp_path / "teacher.h5"]
        for path in paths:
            model.save(path)
    torch.save(network, tmp_path / "teacher.pt")
    fields = ContractFields(input_size=(1, 8, 8), mean=(0.0,), std=(1.0,))
    teachers = [dfadc.load_teacher(path, fields=fields, trust=path.suffix == ".pt") for path in paths]
    test = digits_split[1]
    images, labels = torch.from_numpy(test.images).float() / 255, torch.from_numpy(test.labels)
    teachers.insert(0, dfadc.load_teacher(tmp_path / "teacher.pt", fields=fields, trust=True))
    with torch.no_grad():
        logits = [each.logits(images) for each in teachers]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(logits[1], logits[2]), "the same network to the bit, so one of its files is distilled"
    assert float((logits[0].argmax(1) == labels).double().mean()) > 0.97
    found = [
        accuracy(each, "compact_resnet_8", steps=STEPS, out=tmp_path / f"run{at}", images=images, labels=labels)
        for at, each in enumerate(teachers[:2])
    ]
    assert min(found) > 0.9, found
    assert max(found) - min(found) <= WITHIN, found
