"""Compiled objectives on CUDA; the tests of the CPU are beside those of the objectives."""

from __future__ import annotations

import math

import pytest
import torch
from miniature import build_run

from dfadc.distillation.loop import distill
from dfadc.networks.full_precision import full_fp32

#: torch 2.11 warns of its own way to trace an autograd function, and inductor of what is slow.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def test_a_compiled_loss_is_the_eager_one() -> None:
    run = build_run("dfad", device="cuda")
    distill(run, 2, lambda _: None)
    student_batch, generator_batch = run.student.draw_batch(), run.generator.draw_batch()
    with torch.no_grad(), full_fp32(torch.device("cuda")):
        eager = run.student.loss(student_batch).loss, run.generator.loss(generator_batch).loss
        run.compile()
        compiled = run.student.loss(student_batch).loss, run.generator.loss(generator_batch).loss
    torch.testing.assert_close(torch.stack(compiled), torch.stack(eager), rtol=0.01, atol=0.01)
    losses = []
    distill(run, 5, lambda step: losses.append(float(step.student_loss)))
    assert all(math.isfinite(loss) for loss in losses)
