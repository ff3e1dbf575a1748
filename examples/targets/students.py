"""Students of many families, trained for a few hundred steps on real digits; INT8 on untrained ones shows nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from dfadc import ImageContract
from dfadc.networks.names import build_architecture
from dfadc.verification.agreement import predict
from dfadc.verification.samples import SampleSet
from dfadc.verification.stored_images import dequantise

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Name of a family in the table -> its name for ``--student``.
FAMILIES = {
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3_small": "mobilenet_v3_small",
    "efficientnet_b0": "efficientnet_b0",
    "shufflenet_v2": "shufflenet_v2_x1_0",
    "squeezenet": "squeezenet1_1",
    "regnet_y_400mf": "regnet_y_400mf",
    "mnasnet": "mnasnet1_0",
    "densenet121": "densenet121",
    "resnet18": "resnet18",
    "convnext_tiny": "convnext_tiny",
    "vit": "small_vit:small_vit",
    "swin_t": "swin_t",
    "mobilenetv4_conv_small": "timm:mobilenetv4_conv_small",
    "repvit_m0_9": "timm:repvit_m0_9",
    "efficientformerv2_s0": "timm:efficientformerv2_s0",
    "edgenext_xx_small": "timm:edgenext_xx_small",
    "levit_128s": "timm:levit_128s",
    "mobilevit_xxs": "timm:mobilevit_xxs",
    "convnextv2_atto": "timm:convnextv2_atto",
}
NUM_TEST = 1000
_BATCH_SIZE = 32
#: Momentum of batch norms, torch's default. MNASNet has 0.0003, for days of training: after 600 steps its statistics
#: are those of its initialisation, and in eval mode it puts every image into one class.
_LEAST_MOMENTUM = 0.1


class Digits(NamedTuple):
    """Scikit-learn's handwritten digits, enlarged, in three channels.

    Args:
        contract: of the images.
        pixels: (1797, 3, S, S) uint8; the last ``NUM_TEST`` are for tests.
        labels: (1797,) int64.
    """

    contract: ImageContract
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @property
    def training(self) -> NDArray[np.float32]:
        """(797, 3, S, S) normalised."""
        return dequantise(self.pixels[:-NUM_TEST], self.contract)


class TrainedStudent(NamedTuple):
    """A student in eval mode, the test digits with its logits, and its accuracy on them."""

    module: nn.Module
    samples: SampleSet
    accuracy: float


def read_digits(size: int) -> Digits:
    """The digits at ``size`` x ``size`` pixels, always in the same order."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    small = torch.from_numpy(digits.images[order, None]).float() * (255 / 16)
    large = functional.interpolate(small, size=(size, size), mode="bilinear").round().to(torch.uint8)
    contract = ImageContract((3, size, size), 10, mean=(0.3,) * 3, std=(0.3,) * 3, class_names=tuple("0123456789"))
    return Digits(contract, large.expand(-1, 3, -1, -1).numpy(), digits.target[order].astype(np.int64))


def train_student(family: str, digits: Digits, *, steps: int) -> TrainedStudent:
    """Trains the network of a family on the labels of the training digits, shifted by a twentieth of their size."""
    torch.manual_seed(0)
    module = build_architecture(FAMILIES[family], digits.contract).module
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.momentum is not None:
            part.momentum = max(part.momentum, _LEAST_MOMENTUM)
    images, labels = torch.from_numpy(digits.training), torch.from_numpy(digits.labels[:-NUM_TEST])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    reach = digits.contract.input_size[1] // 20
    for _ in range(steps):
        chosen = torch.randint(len(labels), (_BATCH_SIZE,))
        shift = torch.randint(-reach, reach + 1, (2,)).tolist()
        logits = module.train()(images[chosen].roll(shift, (2, 3)))
        loss = functional.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return _with_logits(module.eval(), digits)


def _with_logits(module: nn.Module, digits: Digits) -> TrainedStudent:
    """Freezes the student's logits for the test digits; it is its own teacher, as only exports are judged here."""
    pixels = digits.pixels[-NUM_TEST:]
    images = torch.from_numpy(dequantise(pixels, digits.contract))
    with torch.no_grad():
        logits = torch.cat([module(batch) for batch in images.split(100)]).numpy()
    samples = SampleSet(
        images=pixels,
        source=np.zeros(NUM_TEST, np.int8),
        sources=("digits",),
        teacher_logits=logits,
        student_logits=logits,
        contract=digits.contract,
    )
    return TrainedStudent(module, samples, float((predict(logits) == digits.labels[-NUM_TEST:]).mean()))
