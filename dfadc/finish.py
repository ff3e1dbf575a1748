"""From a finished game to files: the student, the generator, calibration images and the frozen samples."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dfadc.models.network_file import save_network, serialise
from dfadc.storage import atomic_write_bytes
from dfadc.verification.samples import SampleSet, dequantise, max_samples, quantise

if TYPE_CHECKING:
    from dfadc.distillation.game import Game
    from dfadc.run import RunFolder
    from dfadc.training import Training

#: Images that teacher and student answer at once.
ANSWER_BATCH = 128


def write_results(training: Training, folder: RunFolder) -> None:
    """Writes everything that later stages start from; the same game gives the same bytes.

    Raises:
        StorageFailed: a file could not be written.
    """
    players = training.game.players
    student = players.student.average.eval()
    save_network(
        folder.student,
        student,
        architecture=training.student.architecture,
        stem=training.student.stem,
        contract=training.teacher.contract,
        extra={"dfadc.teacher_sha256": training.teacher.sha256, "dfadc.recipe": training.recipe.name},
    )
    _write_generator(training, folder)
    _write_calibration(training.game, folder)
    freeze_samples(training.game, seed=training.recipe.seed).save(folder.samples)


def freeze_samples(game: Game, *, seed: int) -> SampleSet:
    """Draws the verification samples, quantises them, and only then asks teacher and student, in fp32.

    Half of them come from the averaged generator on latents that training never saw, half were set aside by it over
    the run, under the same rule.
    """
    recipe, contract, players = game.recipe, game.contract, game.players
    total = max(2, min(recipe.verify.num_samples, max_samples(contract, recipe.verify.max_mebibytes * 2**20)))
    # Evenly over the moments of the run, should there be more than the file may hold.
    aside = players.set_aside
    wanted = min(len(aside), total // 2)
    aside = aside[torch.linspace(0, len(aside) - 1, wanted).round().long()] if wanted else aside
    fresh = _draw(game, total - len(aside))
    images = quantise(torch.cat([fresh, aside.float()]).numpy(), contract)
    source = np.repeat(np.array([0, 1], np.int8), [len(fresh), len(aside)])
    as_fed = dequantise(images, contract)
    return SampleSet(
        images=images,
        source=source,
        sources=("generator", "snapshots"),
        teacher_logits=_answers(game.teacher, as_fed, game.policy.device),
        student_logits=_answers(players.student.average, as_fed, game.policy.device),
        contract=contract,
        provenance={"seed": seed, "step": players.step},
    )


@torch.no_grad()
def _draw(game: Game, count: int) -> Tensor:
    generator = game.players.generator.average.eval()
    parts = []
    while count > 0:
        size = min(count, ANSWER_BATCH)
        parts.append(generator(game.players.draw_unseen_latents(size)).float().cpu())
        count -= size
    return torch.cat(parts)


@torch.no_grad()
def _answers(network: nn.Module, images: npt.NDArray[np.float32], device: torch.device) -> npt.NDArray[np.float32]:
    network.eval()
    batches = torch.split(torch.from_numpy(images), ANSWER_BATCH)
    return torch.cat([network(batch.to(device)).float().cpu() for batch in batches]).numpy()


def _write_generator(training: Training, folder: RunFolder) -> None:
    state = training.game.players.generator.average.state_dict()
    metadata = {
        "dfadc.schema": "1",
        "dfadc.generator": training.recipe.generator.model_dump_json(),
        "dfadc.contract": json.dumps(training.teacher.contract.to_dict(), sort_keys=True),
    }
    atomic_write_bytes(folder.generator, serialise(state, metadata))


def _write_calibration(game: Game, folder: RunFolder) -> None:
    reservoir = game.players.reservoir
    kept = reservoir.images[: len(reservoir)].float().cpu().numpy()
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, images=quantise(kept, game.contract))
    atomic_write_bytes(folder.calibration, stream.getvalue())
