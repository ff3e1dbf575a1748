"""One network as torch's file and as ONNX: its students are equally good on real images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dfadc
from dfadc.contract import ContractFields
from dfadc.networks.network_file import load_network

pytestmark = pytest.mark.slow
FASHION_MNIST = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
#: From random weights: none are inherited from an ONNX file.
SETTINGS = ("steps=300", "student.inherit=off", "student.hints=0")
#: Share of the images by which the two accuracies may differ.
WITHIN = 0.01


def accuracy(teacher: dfadc.Teacher, out: Path, images: Tensor, labels: Tensor) -> float:
    """Accuracy of a student on real images (N, C, H, W), normalised."""
    run = dfadc.run_distillation(teacher, "lenet5_half", out=out, recipe=dfadc.load_recipe("auto", SETTINGS))
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
    found = [accuracy(each, tmp_path / str(each.kind), images, labels) for each in (ours, onnx)]
    assert found[0] > 0.5
    assert abs(found[0] - found[1]) <= WITHIN, found
