"""Trains the digits teacher of this example: a small ResNet with batch norm on 797 of scikit-learn's 8x8 digits.

    python examples/believability/train_digits_teacher.py --out believability/digits_teacher

writes `teacher.safetensors`, and `test.npz` with the 1,000 digits that it never saw: so many, because the experiment is
about differences of a point or two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from dfadc import ImageContract
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import save_network

ARCHITECTURE = "compact_resnet_16"
NUM_TEST = 1000
EPOCHS = 30
BATCH_SIZE = 64


def main() -> None:
    """Trains, measures and writes; the test digits choose nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher and test digits")
    out: Path = parser.parse_args().out
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = np.rint(digits.images[order, None] * (255 / 16)).astype(np.uint8)
    labels = digits.target[order].astype(np.int64)
    known = pixels[NUM_TEST:] / 255
    contract = ImageContract(
        input_size=(1, 8, 8),
        num_classes=10,
        mean=(float(known.mean()),),
        std=(float(known.std()),),
        class_names=tuple("0123456789"),
    )
    images = torch.from_numpy((pixels / 255 - known.mean()) / known.std()).float()
    targets = torch.from_numpy(labels)
    torch.manual_seed(0)
    network = build_architecture(ARCHITECTURE, contract).module.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = (len(labels) - NUM_TEST) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for chosen in (torch.randperm(len(labels) - NUM_TEST) + NUM_TEST).split(BATCH_SIZE)[:batches]:
            loss = functional.cross_entropy(network(images[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = (network.eval()(images[:NUM_TEST]).argmax(dim=1) == targets[:NUM_TEST]).float().mean()
    out.mkdir(parents=True, exist_ok=True)
    save_network(out / "teacher.safetensors", network, architecture=ARCHITECTURE, stem="small", contract=contract)
    np.savez(out / "test.npz", images=pixels[:NUM_TEST], labels=labels[:NUM_TEST])
    print(f"teacher {float(right):.2%} on {NUM_TEST:,} digits that it never saw")


if __name__ == "__main__":
    main()
