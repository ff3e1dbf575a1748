"""Between log intervals nothing waits for the device: the host launches the next updates while a GPU computes."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda
from miniature import build_run

from dfadc.distillation.compute.transfer import send
from dfadc.distillation.loop import distill

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.mark.parametrize("recipe", ["auto", "dfad", "pool"])
def test_no_step_waits_for_the_gpu_or_mixes_devices(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as cuda:
        run = build_run(recipe, device="cuda")
        cuda.waits.clear()
        distill(run, 4, lambda _: None)
        for store in run.state.stores:  # from the log interval on, what is overwritten is kept
            store.mark()
        distill(run, 6, lambda _: None)
    assert next(run.state.student.module.parameters()).device.type == "cuda"
    assert cuda.waits == []


def test_what_waits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as cuda:
        tensor = torch.zeros(3, device="cuda")
        send(torch.ones(3), tensor.device)
        assert cuda.waits == []
        float(tensor.sum())
        torch.ones(3).to(tensor.device)
        torch.tensor(1.0, device=tensor.device)
        tensor.cpu()
        assert len(cuda.waits) == 4
        with pytest.raises(RuntimeError, match=r"different devices|same device"):
            tensor + torch.ones(3)
