"""The term of the teacher's last features, and the layer that it is read at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import googlenet, mobilenet_v3_small, squeezenet1_1

from dfadc.distillation.losses.activation import Activation, find_classifier


class Network(nn.Module):
    """Features of known values, and a classifier of 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(4, 3)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.early(features))
        return logits


def test_it_is_minus_the_mean_absolute_feature_that_the_classifier_reads() -> None:
    network = Network()
    classifier = find_classifier(network, 3)
    assert classifier is network.head[1]
    activation = Activation(classifier)
    inputs = torch.randn(5, 4, requires_grad=True)
    activation.watching = True
    network(inputs)
    term = activation.take()
    features = np.maximum(network.early(inputs).detach().numpy(), 0)
    assert term.item() == pytest.approx(-np.abs(features).mean(), rel=1e-6)
    assert torch.autograd.grad(term, inputs)[0].abs().sum() > 0


def test_it_keeps_nothing_unless_watching_and_leaves_no_hook() -> None:
    network = Network()
    activation = Activation(network.head[1])
    network(torch.randn(2, 4))
    with pytest.raises(AssertionError, match="nothing was watched"):
        activation.take()
    activation.close()
    activation.watching = True
    network(torch.randn(2, 4))
    with pytest.raises(AssertionError, match="nothing was watched"):
        activation.take()


def test_half_precision_features_are_averaged_in_fp32() -> None:
    network = Network().bfloat16()
    activation = Activation(network.head[1])
    activation.watching = True
    network(torch.randn(2, 4, dtype=torch.bfloat16))
    assert activation.take().dtype == torch.float32


def test_the_classifier_is_found_in_networks_of_the_field() -> None:
    with torch.device("meta"):
        auxiliary = googlenet(num_classes=7, aux_logits=True, init_weights=False)
        assert find_classifier(auxiliary, 7) is auxiliary.fc
        mobile = mobilenet_v3_small(num_classes=7)
        assert find_classifier(mobile, 7) is mobile.classifier[-1]
        # Its classifier is a 1x1 convolution.
        squeeze = squeezenet1_1(num_classes=7)
        assert find_classifier(squeeze, 7) is squeeze.classifier[1]
    assert find_classifier(nn.Sequential(nn.Linear(4, 3)), 5) is None
