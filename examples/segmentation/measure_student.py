"""Segmentation of real scenes by a run's student, against their masks and against its teacher.

python examples/segmentation/measure_student.py runs/segmentation
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scenes import SCENES_FILE
from train_segmenter import TEACHER_FILE

from dfadc.cli.script import run_as_script
from dfadc.evaluation.masks import load_masked_images
from dfadc.networks.logits import answering_pixels
from dfadc.networks.network_file import load_network
from dfadc.run_folder import open_run
from dfadc.verification.pixel_scores import PixelScores, count_pixels


@torch.no_grad()
def main(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    *,
    teacher: Annotated[Path, typer.Option(help="The run's teacher file.")] = TEACHER_FILE,
    data: Annotated[Path, typer.Option(help="Scenes with masks.")] = SCENES_FILE,
) -> None:
    """Prints pixel accuracy or agreement with its interval, and the mean IoU."""
    contract = open_run(run).contract()
    scenes = load_masked_images(data, contract)
    answers = []
    for path in (teacher, open_run(run).student):
        network = answering_pixels(load_network(path)[0], contract).eval()
        logits = [network(torch.from_numpy(images)).numpy() for images in scenes.batches(50)]
        answers.append((logits, np.concatenate(logits).argmax(axis=1).astype(np.uint8)))
    (of_teacher, taught), (of_student, learned) = answers
    for what, counts in (
        ("teacher, with the masks", scenes.judge(iter(of_teacher))),
        ("student, with the masks", scenes.judge(iter(of_student))),
        ("student, with the teacher", count_pixels(learned, taught, contract.num_classes)),
    ):
        scores = PixelScores.of(counts)
        print(f"{what:26} {scores.rate:.2%} [{scores.low:.2%}, {scores.high:.2%}]  mean IoU {scores.mean_iou:.2%}")


if __name__ == "__main__":
    run_as_script(main)
