"""One weight initialisation for our own networks."""

from __future__ import annotations

from torch import nn


def initialise_weights_(network: nn.Module) -> None:
    """Fills every layer in place: Kaiming for convolutions (fan-out, ReLU), identity for norms, normal for linear.

    Source: He et al. 2015 (arXiv 1502.01852), as torchvision's ResNets do; the linear layers keep biases at 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
