from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import load_network, refuse_factory_from_file, save_network

if TYPE_CHECKING:
    from pathlib import Path

CONTRACT = ImageContract((1, 28, 28), 3, mean=(0.5,), std=(0.25,), class_names=("a", "ß", "c"))


@pytest.mark.parametrize("name", ["squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5"])
def test_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """MNASNet's own loading asks for the version of its format, which a file of tensors does not hold."""
    built = build_architecture(f"torchvision:{name}", CONTRACT, stem="small")
    file = tmp_path / "student.safetensors"
    save_network(
        file, built.module, architecture=built.name, stem=built.stem, contract=CONTRACT, extra={"dfadc.seed": "7"}
    )
    module, metadata = load_network(file)
    assert metadata.contract == CONTRACT
    assert (metadata.architecture, metadata.stem) == (f"torchvision:{name}", "small")
    assert metadata.extra == {"dfadc.seed": "7"}
    assert not module.training
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(module(images), built.module.eval()(images), rtol=0, atol=0)


def test_bytes_are_reproducible(tmp_path: Path) -> None:
    """The safetensors library alone writes its metadata in an order that changes from call to call."""
    built = build_architecture("lenet5_half", CONTRACT)
    extra = {f"key{index}": str(index) for index in range(8)}
    files = [tmp_path / f"{index}.safetensors" for index in range(4)]
    for file in files:
        save_network(file, built.module, architecture="lenet5_half", stem="default", contract=CONTRACT, extra=extra)
    assert len({file.read_bytes() for file in files}) == 1


def test_channels_last_and_compiled_modules_are_saved_plain(tmp_path: Path) -> None:
    built = build_architecture("lenet5", CONTRACT)
    plain, wrapped = tmp_path / "plain.safetensors", tmp_path / "wrapped.safetensors"
    save_network(plain, built.module, architecture=built.name, stem=built.stem, contract=CONTRACT)
    # Wrapping compiles nothing before the first call.
    compiled = torch.compile(built.module.to(memory_format=torch.channels_last))
    assert isinstance(compiled, nn.Module)
    save_network(wrapped, compiled, architecture=built.name, stem=built.stem, contract=CONTRACT)
    assert plain.read_bytes() == wrapped.read_bytes()


def test_reserved_metadata_is_refused(tmp_path: Path) -> None:
    built = build_architecture("lenet5", CONTRACT)
    with pytest.raises(DfadcError, match="reserved"):
        save_network(
            tmp_path / "x",
            built.module,
            architecture="lenet5",
            stem="default",
            contract=CONTRACT,
            extra={"dfadc.contract": "{}"},
        )


def test_a_file_may_not_choose_code_to_import(tmp_path: Path) -> None:
    file = tmp_path / "evil.safetensors"
    built = build_architecture("lenet5", CONTRACT)
    save_network(file, built.module, architecture="os:system", stem="default", contract=CONTRACT)
    with pytest.raises(DfadcError, match="would import code"):
        load_network(file)


def test_damaged_foreign_and_missing_files(tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(DfadcError, match=r"dfadc\.schema"):
        load_network(file)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DfadcError, match="cannot read"):
        load_network(file)
    with pytest.raises(DfadcError, match="cannot read"):
        load_network(tmp_path / "missing.safetensors")


def test_an_allowed_factory_may_have_arguments(tmp_path: Path) -> None:
    for allowed in ("nets.py:Net", "nets.py:Net(width=2)"):
        refuse_factory_from_file("nets.py:Net(width=2)", tmp_path, allowed=[allowed])
    for allowed in ("nets.py:Other", "nets.py:Net(width=3)"):
        with pytest.raises(DfadcError, match="would import code"):
            refuse_factory_from_file("nets.py:Net(width=2)", tmp_path, allowed=[allowed])
