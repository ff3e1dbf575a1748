"""Sources of the generator's latents: fresh ones, or noisy embeddings of classes that are trained for a step.

Every source has the same verbs: ``renew_`` before the generator's updates of a step, ``draw`` for each update.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FreshLatents(nn.Module):
    """Standard-normal latents, new ones for every update (Fang et al. 2019, algorithm 1).

    Args:
        latent_dim: Z.
        rng: of the training's latents, on the device where they are drawn.
    """

    #: Whether the latents have parameters, which are trained with the generator.
    are_trained = False

    def __init__(self, latent_dim: int, rng: torch.Generator) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.rng = rng

    @property
    def targets(self) -> Tensor | None:
        """Classes (N,) that the teacher is to see in the images of this step's latents; None: any."""
        return None

    def renew_(self) -> None:
        """Before the generator's updates of a step."""

    def draw(self, count: int) -> Tensor:
        """Latents (count, Z)."""
        return torch.randn(count, self.latent_dim, generator=self.rng, device=self.rng.device)


class NoisyLayers(FreshLatents):
    """Latents that know their class: its fixed embedding through a linear layer, which each step re-draws and trains.

    Images of one class differ by the layer: a batch of N images has ⌈N / K⌉, each for at most one image a class.
    Source: NAYER (2310.00258). Deviations: the embedding is a fixed standard-normal vector instead of one of a text
    encoder; weights are N(0, 1/E) instead of N(0, 1), so that latents have about the variance of any other's; the
    embeddings are standardised once instead of by a batch norm.

    Args:
        latent_dim: Z, and the embedding's length E.
        rng: of the training's latents.
        batch_size: N.
        num_classes: K.
    """

    are_trained = True
    classes: Tensor
    embeddings: Tensor

    def __init__(self, latent_dim: int, rng: torch.Generator, *, batch_size: int, num_classes: int) -> None:
        super().__init__(latent_dim, rng)
        embeddings = super().draw(num_classes)
        embeddings = (embeddings - embeddings.mean(dim=0)) / embeddings.std(dim=0).clamp_min(1e-6)
        num_layers = -(-batch_size // num_classes)
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("classes", torch.zeros(batch_size, dtype=torch.long, device=rng.device))
        self.weights = nn.Parameter(torch.empty(num_layers, latent_dim, latent_dim, device=rng.device))
        self.biases = nn.Parameter(torch.empty(num_layers, 1, latent_dim, device=rng.device))
        self.renew_()

    @property
    def targets(self) -> Tensor:
        """Classes (N,), one for each latent."""
        return self.classes

    def renew_(self) -> None:
        """Draws layers and classes anew."""
        with torch.no_grad():
            self.weights.normal_(std=self.latent_dim**-0.5, generator=self.rng)
            self.biases.zero_()
        self.classes.copy_(balanced_targets(len(self.classes), len(self.embeddings), self.rng))

    def draw(self, count: int) -> Tensor:
        """The first ``count`` latents of the step's classes; their graph leads to the layers."""
        num_classes = len(self.embeddings)
        embedded = self.embeddings[self.classes[:count]]
        # Image i belongs to layer i // K; the last layer is padded to K images.
        padded = nn.functional.pad(embedded, (0, 0, 0, -count % num_classes))
        layers = len(padded) // num_classes
        grouped = padded.view(layers, num_classes, -1)
        biases: Tensor = self.biases
        weights: Tensor = self.weights
        if layers < len(weights):  # the gradient of a part is a copy of it among zeros for the rest
            biases, weights = biases[:layers], weights[:layers]
        latents = torch.baddbmm(biases, grouped, weights)
        return latents.view(len(padded), -1)[:count]


def balanced_targets(count: int, num_classes: int, rng: torch.Generator) -> Tensor:
    """Classes (count,), each ⌊count / K⌋ or ⌈count / K⌉ times; every K in a row are all of them in random order."""
    rounds = -(-count // num_classes)
    orders = [torch.randperm(num_classes, generator=rng, device=rng.device) for _ in range(rounds)]
    return torch.cat(orders)[:count]


def build_latents(
    source: str, latent_dim: int, rng: torch.Generator, *, batch_size: int, num_classes: int
) -> FreshLatents:
    """The source of latents that a recipe names."""
    if source == "fresh":
        return FreshLatents(latent_dim, rng)
    return NoisyLayers(latent_dim, rng, batch_size=batch_size, num_classes=num_classes)
