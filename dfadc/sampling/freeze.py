"""From a finished game to files: the student, the generator, calibration images and the frozen samples."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dfadc.distillation.generator.networks import draws_pixels
from dfadc.networks.logits import answering_pixels
from dfadc.networks.network_file import save_network, serialise
from dfadc.sampling.calibration import Calibration, choose_calibration
from dfadc.sampling.generators import (
    PRIOR_SEED,
    PROCEDURAL_SHARE,
    can_refine,
    draw,
    draw_prior,
    train_adversary,
    train_prior,
)
from dfadc.sampling.lengths import ADVERSARY_RESTARTS, refine_steps, verification_steps
from dfadc.storage import atomic_write_bytes, sha256_file
from dfadc.training.sample_size import choose_num_samples
from dfadc.verification.pixel_agreement import choose_positions
from dfadc.verification.pixel_samples import DenseSampleSet, batch_size, collect_dense
from dfadc.verification.samples import STUDENT_SHA256, TEACHER_SHA256, SampleSet
from dfadc.verification.stored_images import StoredImages, dequantise, quantise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from dfadc.contract import ImageContract
    from dfadc.distillation.objectives import Game
    from dfadc.distillation.state import Players
    from dfadc.run_folder import RunFolder
    from dfadc.training.run import Training
    from dfadc.verification.pixel_samples import Samples

#: Images that a generator draws or a network answers at once, at most.
ANSWER_BATCH = 128


def write_results(training: Training, folder: RunFolder, on_note: Callable[[str], None] = lambda _: None) -> None:
    """Writes everything that later stages start from; the same game gives the same bytes.

    Args:
        training: played to its end.
        folder: of the run.
        on_note: told what takes a while, and what is not as the recipe asks.

    Raises:
        StorageFailed: a file could not be written.
    """
    game = training.game
    save_network(
        folder.student,
        game.players.student.average.eval(),
        architecture=training.student.architecture,
        stem=training.student.stem,
        contract=training.teacher.contract,
        extra={"dfadc.teacher_sha256": training.teacher.sha256, "dfadc.recipe": training.recipe.name},
    )
    _write_generator(game.players, game, folder.generator)
    prior_steps, adversary_steps = verification_steps(game.recipe)
    on_note(
        f"finishing: a prior generator of {prior_steps} updates and samples of it, then "
        f"{ADVERSARY_RESTARTS} adversaries of {adversary_steps}"
    )
    prior, adversary = train_prior(game), train_adversary(game)
    _write_generator(prior, game, folder.prior)
    samples = freeze_samples(game, prior=prior, adversary=adversary)
    networks = {TEACHER_SHA256: training.teacher.sha256, STUDENT_SHA256: sha256_file(folder.student)}
    samples = replace(samples, provenance={**samples.provenance, **networks})
    samples.save(folder.samples)
    calibration = collect_calibration(game, prior=prior, exclude=samples)
    calibration.save(folder.calibration)
    for note in calibration.notes:
        on_note(f"calibration: {note}")


def freeze_samples(game: Game, *, prior: Players | None = None, adversary: Players | None = None) -> Samples:
    """Draws the verification samples, quantises them, and only then asks teacher and student, in fp32.

    Those of the averaged generator make up for a source that has none. All come from latents that no training saw.
    """
    recipe, contract = game.recipe, game.contract
    total = choose_num_samples(recipe.verify, contract)
    # Evenly over the moments of the run, should there be more than the file may hold.
    aside = game.players.set_aside
    wanted = min(len(aside), recipe.verify.count_of("snapshots", total))
    most = _batch_size(game)
    num_prior, num_adversary = (recipe.verify.count_of(source, total) for source in ("prior", "adversary"))
    aside = aside[torch.linspace(0, len(aside) - 1, wanted).round().long()] if wanted else aside[:0]
    images = {
        "snapshots": _stored(aside.split(most), contract),
        "prior": _stored(draw_prior(game, prior, num_prior, most) if prior else (), contract),
        "adversary": _draw(game, adversary, num_adversary),
    }
    rest = total - sum(map(len, images.values()))
    images = {"generator": _draw(game, game.players, rest), **images}
    stored = np.concatenate(list(images.values()))
    source = np.repeat(np.arange(len(images), dtype=np.int8), [len(drawn) for drawn in images.values()])
    provenance = _provenance(game, len(images["prior"]))
    networks = (game.teacher, game.players.student.average)
    if contract.task == "segmentation":
        positions = choose_positions(*contract.input_size[1:])
        teacher, student = (
            collect_dense(_answers(network, stored, game), positions, contract=contract, who="the network")
            for network in networks
        )
        return DenseSampleSet(
            stored, source, tuple(images), teacher, student, positions, contract, provenance=provenance
        )
    teacher_logits, student_logits = (_logits(network, stored, game) for network in networks)
    return SampleSet(stored, source, tuple(images), teacher_logits, student_logits, contract, provenance=provenance)


def _provenance(game: Game, prior_samples: int) -> dict[str, str | int | float]:
    """How the samples were made: seeds, how long each generator was trained, and how far pixels were moved."""
    recipe = game.recipe
    prior_steps, adversary_steps = verification_steps(recipe)
    refined = refine_steps(recipe, prior_samples) if prior_samples and can_refine(game) else 0
    return {
        "seed": recipe.seed,
        "step": game.players.step,
        "prior_steps": prior_steps,
        "prior_seed": PRIOR_SEED,
        "sharpen_steps": refined,
        "procedural_share": PROCEDURAL_SHARE if refined else 0.0,
        "adversary_steps": adversary_steps,
        "adversary_restarts": ADVERSARY_RESTARTS,
    }


def collect_calibration(game: Game, *, prior: Players | None, exclude: Samples) -> Calibration:
    """Images for INT8 of the whole run, of the final generator and of the prior generator; none of the samples."""
    settings, contract, reservoir = game.recipe.calibration, game.contract, game.players.reservoir
    # Twice what is asked for, so that the classes can be balanced.
    wanted = 2 * settings.num_images
    candidates = {
        "reservoir": _stored(reservoir.images[: len(reservoir)].cpu().split(_batch_size(game)), contract),
        "generator": _draw(game, game.players, wanted),
        "prior": _draw(game, prior, wanted),
    }
    answers = _classes_of_images(candidates, game)
    return choose_calibration(candidates, answers, num_images=settings.num_images, exclude=exclude.images)


def _draw(game: Game, players: Players | None, count: int) -> StoredImages:
    """``count`` images as they are stored; none where there is no such generator."""
    return _stored(() if players is None else draw(players, count, _batch_size(game)), game.contract)


def _batch_size(game: Game) -> int:
    """Images that are drawn or answered at once."""
    return batch_size(game.contract, min(ANSWER_BATCH, game.images_at_once))


def _stored(batches: Iterable[Tensor], contract: ImageContract) -> StoredImages:
    """Normalised batches (n, C, H, W) as they are stored, a batch at a time: floats take four times the memory."""
    nothing = np.empty((0, *contract.input_size), np.float32)
    return np.concatenate([quantise(images, contract) for images in (nothing, *(b.float().numpy() for b in batches))])


def _classes_of_images(candidates: Mapping[str, StoredImages], game: Game) -> dict[str, npt.NDArray[np.float32]]:
    """Logits (N, K) of each source by which calibration images are balanced over the classes.

    A dense teacher gives an image many classes: the highest is then the one that the image shows most of beside what
    all images show of it, for nearly every image shows more background than anything else.
    """
    if game.contract.task == "classification":
        return {name: _logits(game.teacher, images, game) for name, images in candidates.items()}
    shares = {name: _class_shares(images, game) for name, images in candidates.items()}
    mean = np.concatenate(list(shares.values())).mean(axis=0)
    return {name: found / np.maximum(mean, 1e-6) for name, found in shares.items()}


def _class_shares(stored: StoredImages, game: Game) -> npt.NDArray[np.float32]:
    """(N, K) share of each image's pixels that the teacher puts into each class."""
    num_classes = game.contract.num_classes
    shares = [np.empty((0, num_classes), np.float32)]
    for logits in _answers(game.teacher, stored, game):
        classes = logits.argmax(axis=1)
        shares.append(np.stack([(classes == index).mean(axis=(1, 2)) for index in range(num_classes)], axis=1))
    return np.concatenate(shares).astype(np.float32)


def _logits(network: nn.Module, stored: StoredImages, game: Game) -> npt.NDArray[np.float32]:
    """Logits (N, K) in fp32 to images as they are stored."""
    return np.concatenate([np.empty((0, game.contract.num_classes), np.float32), *_answers(network, stored, game)])


@torch.no_grad()
def _answers(network: nn.Module, stored: StoredImages, game: Game) -> Iterator[npt.NDArray[np.float32]]:
    """Batches of logits (n, K) or, at the images' size, (n, K, H, W), in fp32 to images as they are stored."""
    answering = answering_pixels(network, game.contract).eval()
    size = _batch_size(game)
    for start in range(0, len(stored), size):
        images = torch.from_numpy(dequantise(stored[start : start + size], game.contract))
        yield answering(images.to(game.policy.device)).float().cpu().numpy()


def _write_generator(players: Players, game: Game, path: Path) -> None:
    metadata = {
        "dfadc.schema": "1",
        "dfadc.generator": players.generator.rules.model_dump_json(),
        "dfadc.bounded": json.dumps(draws_pixels(game.recipe.generator, game.contract)),
        "dfadc.contract": json.dumps(game.contract.to_dict(), sort_keys=True),
    }
    atomic_write_bytes(path, serialise(players.generator.average.state_dict(), metadata))
