"""Full fp32: on CUDA for as long as the context is open, whatever ends it; elsewhere nothing is touched."""

from __future__ import annotations

import pytest
import torch

from dfadc.networks.full_precision import full_fp32


def settings() -> tuple[str, str]:
    convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return convolutions, torch.backends.cuda.matmul.fp32_precision


def test_cuda_computes_in_full_within_the_context_and_as_before_behind_it() -> None:
    before = settings()
    with full_fp32(torch.device("cuda")):
        assert settings() == ("ieee", "ieee")
    assert settings() == before
    with pytest.raises(ZeroDivisionError), full_fp32(torch.device("cuda", 0)):
        raise ZeroDivisionError
    assert settings() == before


def test_other_devices_are_left_as_they_are() -> None:
    before = settings()
    with full_fp32(torch.device("cpu")):
        assert settings() == before
