"""The compute policy of a device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dfadc.distillation.compute.policy import choose_device, choose_policy, fit_policy
from dfadc.errors import DfadcError
from dfadc.recipe.schema import ComputeSettings

CPU = torch.device("cpu")


def test_auto_takes_an_accelerator_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == expected
    assert choose_device().type == expected


def test_a_named_device_is_taken() -> None:
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", "cuda:99", "xla"])
def test_a_device_that_cannot_train_is_refused(name: str) -> None:
    with pytest.raises(DfadcError, match=f"device '{name}'") as caught:
        choose_device(name)
    assert "--device" in caught.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DfadcError, match="device 'cuda' cannot be used"):
        choose_device("cuda")


def test_auto_takes_bf16_where_the_cpu_computes_it() -> None:
    policy = choose_policy(ComputeSettings(), CPU)
    features = torch.cpu.get_capabilities()
    has_units = bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    assert policy.precision == ("bf16" if has_units else "fp32")
    assert ("AMX" in policy.reason) or ("AVX512-BF16" in policy.reason)


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16"])
def test_auto_leaves_networks_that_gain_nothing_in_fp32(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    small, large = (choose_policy(ComputeSettings(), CPU, flops) for flops in (1e6, 1e8))
    assert (small.precision, large.precision) == ("fp32", "bf16")
    assert "MFLOPs" in small.reason
    assert large == choose_policy(ComputeSettings(), CPU)
    assert choose_policy(ComputeSettings(precision="bf16"), CPU, 1e6).precision == "bf16"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_a_named_precision_is_taken(precision: Any, dtype: torch.dtype | None) -> None:
    policy = choose_policy(ComputeSettings(precision=precision), CPU)
    assert policy.autocast_dtype == dtype
    assert policy.precision == precision
    assert policy.reason == "as asked"
    assert not policy.scales_gradients
    with policy.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (dtype or torch.float32)


def test_fp16_needs_cuda() -> None:
    with pytest.raises(DfadcError, match="fp16 training needs CUDA") as caught:
        choose_policy(ComputeSettings(precision="fp16"), CPU)
    assert "bf16" in caught.value.hint


def test_fp16_scales_gradients() -> None:
    policy = choose_policy(ComputeSettings(precision="fp16"), torch.device("cuda"))
    assert policy.precision == "fp16"
    assert policy.scales_gradients


def test_images_and_weights_are_nhwc() -> None:
    assert choose_policy(ComputeSettings(), CPU).memory_format == torch.channels_last


def test_an_unknown_accelerator_computes_in_fp32() -> None:
    policy = choose_policy(ComputeSettings(), torch.device("mps"))
    assert policy.precision == "fp32"
    assert "mps" in policy.reason


@pytest.mark.parametrize(
    ("layer", "is_fragile"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(16, 16, 1, stride=2, groups=4), True),
        (nn.Conv2d(8, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
    ],
)
def test_what_nhwc_breaks_on_a_cpu_is_nchw_there(layer: nn.Module, is_fragile: bool) -> None:
    cpu = choose_policy(ComputeSettings(), torch.device("cpu"))
    fitted, notes = fit_policy(cpu, nn.Sequential(nn.ReLU(), layer))
    assert fitted.channels_last is not is_fragile
    assert len(notes) == is_fragile
    cuda = replace(cpu, device=torch.device("cuda"))
    assert fit_policy(cuda, layer) == (cuda, ())
