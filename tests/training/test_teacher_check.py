"""Probe of a teacher before the first step: refusals, notes, and the batch norms that count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from miniature import SMALL_CONTRACT, as_teacher, make_teacher
from torch import Tensor, nn
from torchvision.models import googlenet

from dfadc.contract import ImageContract
from dfadc.distillation.losses.discrepancy import logit_scale
from dfadc.errors import DfadcError
from dfadc.teacher.load import load_teacher
from dfadc.training.teacher_check import TeacherProbe, probe_teacher, synthetic_images

if TYPE_CHECKING:
    from pathlib import Path


class Bent(nn.Module):
    """A sound teacher whose logits are multiplied and moved."""

    def __init__(self, factor: float, offset: float = 0.0) -> None:
        super().__init__()
        self.network = make_teacher(SMALL_CONTRACT)
        self.factor, self.offset = factor, offset

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.factor * self.network(images) + self.offset
        return logits


def probe(teacher: nn.Module, contract: ImageContract = SMALL_CONTRACT) -> TeacherProbe:
    return probe_teacher(as_teacher(teacher.eval(), contract))


def test_a_sound_teacher_passes_without_a_word(digits_teacher: Path) -> None:
    teacher = load_teacher(digits_teacher)
    probed = probe_teacher(teacher)
    assert probed.notes == ()
    assert probed.batch_norms == teacher.batch_norms
    assert 1 < probed.scale < 20
    assert not any(layer._forward_pre_hooks for layer in teacher.module.modules())  # noqa: SLF001 -- torch's place


@pytest.mark.parametrize("offset", [0.0, 3.0, -1e4])
def test_a_teacher_of_constant_answers_is_refused(offset: float) -> None:
    with pytest.raises(DfadcError, match="same logits to 24 very different images") as caught:
        probe(Bent(0.0, offset))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("factor", [1e7, 1e-7])
def test_a_wild_scale_is_refused_with_the_factor_that_mends_it(factor: float) -> None:
    with pytest.raises(DfadcError, match="wild scale") as caught:
        probe(Bent(factor))
    assert caught.value.exit_code == 2
    mend = float(caught.value.hint.rpartition("multiply its last layer by ")[2])
    assert 0.3 < probe(Bent(factor * mend)).scale < 3


@pytest.mark.parametrize("factor", [2e3, 1e-3])
def test_an_unusual_scale_is_noted(factor: float) -> None:
    note, *_ = probe(Bent(factor)).notes
    assert "unusual scale" in note
    assert "scaled_l1" in note


def test_one_class_for_all_images_is_noted_with_its_likely_cause() -> None:
    class OneClass(Bent):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits + 100 * torch.eye(logits.shape[1])[2]

    (note,) = probe(OneClass(1.0)).notes
    assert "class 2" in note
    assert "--mean, --std" in note
    assert not any("very different" in each for each in probe(Bent(30.0)).notes)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DfadcError, match="not finite"):
        probe(Bent(float("nan")))


def test_the_scale_is_that_of_the_discrepancy() -> None:
    teacher = make_teacher(SMALL_CONTRACT)
    with torch.no_grad():
        expected = float(logit_scale(teacher(synthetic_images(SMALL_CONTRACT))))
    assert probe(teacher).scale == pytest.approx(expected)


def test_only_batch_norms_that_an_image_passes_count() -> None:
    """The auxiliary heads of GoogLeNet sleep in eval mode."""
    torch.manual_seed(0)
    teacher = googlenet(num_classes=5, aux_logits=True, init_weights=False).eval()
    contract = ImageContract((3, 32, 32), 5, mean=(0.5,) * 3, std=(0.2,) * 3)
    probed = probe(teacher, contract)
    assert len(probed.batch_norms) == 57
    assert any("2 of the teacher's batch norms see no image" in note for note in probed.notes)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_images_are_in_range_of_three_kinds_and_the_same_every_time(channels: int) -> None:
    contract = ImageContract((channels, 9, 7), 4, mean=(0.4,) * channels, std=(0.2,) * channels)
    torch.rand(3)
    images = synthetic_images(contract)
    assert images.shape == (24, channels, 9, 7)
    assert torch.equal(images, synthetic_images(contract))
    low, high = contract.value_range()
    for channel in range(channels):
        assert low[channel] <= float(images[:, channel].min()) <= float(images[:, channel].max()) <= high[channel]
    roughness = images.diff(dim=3).abs().mean(dim=(1, 2, 3)).view(3, 8).mean(dim=1)
    assert roughness[0] > roughness[1] > roughness[2] == 0
