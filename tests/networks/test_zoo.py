from __future__ import annotations

import pytest
import torch

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.flops import count_flops, count_parameters
from dfadc.networks.zoo import NETWORKS, find_network


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28)])
@pytest.mark.parametrize("name", NETWORKS)
def test_gives_logits_for_both_sizes_of_the_papers(name: str, size: tuple[int, int, int]) -> None:
    network = NETWORKS[name](ImageContract(size, 7)).eval()
    with torch.no_grad():
        logits = network(torch.randn(2, *size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 0


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18_8x", 11.17), ("resnet34_8x", 21.28), ("wrn_40_2", 2.24), ("wrn_16_1", 0.175), ("vgg11_bn", 9.23)],
)
def test_has_the_parameters_of_the_papers(name: str, millions: float) -> None:
    network = NETWORKS[name](ImageContract((3, 32, 32), 10))
    assert count_parameters(network) / 1e6 == pytest.approx(millions, rel=0.005)


def test_lenet_refuses_sizes_it_has_no_layers_for() -> None:
    with pytest.raises(DfadcError, match="28 or 32 px"):
        NETWORKS["lenet5"](ImageContract((1, 64, 64), 10))


def test_family_names_are_parsed_and_bounded() -> None:
    contract = ImageContract((3, 32, 32), 10)
    wide = find_network("wrn_22_1")
    compact = find_network("compact_resnet_20")
    assert wide is not None
    assert compact is not None
    assert count_parameters(compact(contract)) < count_parameters(wide(contract))
    impossible, too_wide = find_network("wrn_17_2"), find_network("compact_resnet_512")
    assert impossible is not None
    assert too_wide is not None
    with pytest.raises(DfadcError, match="6n \\+ 4"):
        impossible(contract)
    with pytest.raises(DfadcError, match=r"4\.\.256"):
        too_wide(contract)
    assert find_network("wrn_40") is None


def test_compact_resnet_ends_at_an_eighth_of_the_size() -> None:
    network = NETWORKS["compact_resnet_16"](ImageContract((3, 48, 32), 10))
    stages = network.get_submodule("stages")
    assert stages(network.get_submodule("stem")(torch.randn(1, 3, 48, 32))).shape == (1, 64, 6, 4)


def test_flops_of_a_known_network() -> None:
    """LeNet5 at 28 px by hand: 2 x positions x kernel x channels, convolution by convolution."""
    network = NETWORKS["lenet5"](ImageContract((1, 28, 28), 10))
    by_hand = 2 * (28**2 * 25 * 6 + 10**2 * 25 * 6 * 16 + 25 * 16 * 120 + 120 * 84 + 84 * 10)
    assert count_flops(network, (1, 28, 28)) == by_hand
    assert all(not parameter.is_meta for parameter in network.parameters())
