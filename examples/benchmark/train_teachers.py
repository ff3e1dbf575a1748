"""Trains the teachers of the tasks that are built from scikit-learn's images, as they are committed.

    OMP_NUM_THREADS=1 python examples/benchmark/train_teachers.py digits
    OMP_NUM_THREADS=1 python examples/benchmark/train_teachers.py colour

prints the accuracy on the task's test images, which choose nothing: the weights of the last step are saved. The
teachers of Fashion-MNIST come from ``examples/fashion_mnist/train_teacher.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from tasks import TASKS
from train_teacher import Split, Training, fit, measure_accuracy

from dfadc.cli.script import run_as_script
from dfadc.contract import ImageContract
from dfadc.distillation.compute.policy import choose_policy
from dfadc.errors import DfadcError
from dfadc.networks.flops import count_parameters
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import save_network
from dfadc.recipe.schema import ComputeSettings

#: Task -> architecture of its teacher, and how that is trained.
TEACHERS = {
    "digits": ("compact_resnet_16", Training(epochs=60, batch_size=64, peak_rate=0.1, shift=1, flips=False)),
    "colour": ("compact_resnet_24", Training(epochs=12, batch_size=128, peak_rate=0.2, shift=0, flips=False)),
}


def main(
    name: Annotated[str, typer.Argument(metavar="TASK", help=" or ".join(TEACHERS))],
    *,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the task's own number.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Instead of the task's teacher file.")] = None,
) -> None:
    """Trains the teacher of a task and writes it as a dfadc teacher file."""
    if name not in TEACHERS:
        raise DfadcError(f"no teacher of a task {name!r} is trained here", f"known: {', '.join(TEACHERS)}")
    architecture, training = TEACHERS[name]
    training = training._replace(epochs=epochs or training.epochs)
    train, test = (TASKS[name].load(split, None) for split in ("train", "test"))
    contract = contract_of(train)
    torch.manual_seed(seed)
    teacher = build_architecture(architecture, contract)
    print(f"{teacher.name}: {count_parameters(teacher.module):,} parameters, {len(train.labels):,} images", flush=True)
    policy = choose_policy(ComputeSettings(precision="fp32"), torch.device("cpu"))
    fit(teacher.module, train, training, contract=contract, policy=policy)
    accuracy = measure_accuracy(teacher.module, test, contract)
    path = out or TASKS[name].teacher
    save_network(
        path,
        teacher.module.to(memory_format=torch.contiguous_format),
        architecture=teacher.name,
        stem=teacher.stem,
        contract=contract,
        extra={"dfadc.training": f"{training}, seed {seed}: {accuracy:.2%} of {len(test.labels):,} images"},
    )
    print(f"test accuracy {accuracy:.2%} on {len(test.labels):,} images; wrote {path}")


def contract_of(train: Split) -> ImageContract:
    """Contract of ten digits, normalised by mean and standard deviation of each channel of ``train``."""
    pixels = train.images.transpose(0, 1).flatten(1).double().div(255)
    channels, height, width = train.images.shape[1:]
    return ImageContract(
        input_size=(channels, height, width),
        num_classes=10,
        mean=tuple(round(value, 4) for value in pixels.mean(dim=1).tolist()),
        std=tuple(round(value, 4) for value in pixels.std(dim=1).tolist()),
        class_names=tuple("0123456789"),
    )


if __name__ == "__main__":
    run_as_script(main)
