"""Torchvision's Vision Transformer in a size for small images, as ``--student small_vit:small_vit`` takes it."""

from __future__ import annotations

from torchvision.models import VisionTransformer


def small_vit(num_classes: int, image_size: int) -> VisionTransformer:
    """Four layers of width 64 over an 8 x 8 grid of patches; the library's own have 86 million parameters or more."""
    return VisionTransformer(
        image_size=image_size,
        patch_size=image_size // 8,
        num_layers=4,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=256,
        num_classes=num_classes,
    )
