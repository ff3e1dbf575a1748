"""Results of a finished run as files: student, generators, calibration images and the frozen samples."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dfadc.distillation.generator.networks import draws_pixels
from dfadc.distillation.images.balanced import draw_balanced
from dfadc.networks.full_precision import full_fp32
from dfadc.networks.logits import answering_pixels
from dfadc.networks.network_file import save_network, serialise
from dfadc.sampling.calibration import Calibration, choose_calibration
from dfadc.sampling.generators import (
    PRIOR_SEED,
    PROCEDURAL_SHARE,
    can_refine,
    draw,
    draw_prior,
    needs_prior,
    train_adversary,
    train_prior,
)
from dfadc.sampling.lengths import ADVERSARY_RESTARTS, refine_steps, verification_steps
from dfadc.storage import atomic_write_bytes, sha256_file
from dfadc.training.sample_size import choose_num_samples
from dfadc.verification.pixel_outputs import batch_size, choose_positions, collect_dense
from dfadc.verification.pixel_samples import DenseSampleSet
from dfadc.verification.samples import STUDENT_SHA256, TEACHER_SHA256, SampleSet
from dfadc.verification.stored_images import StoredImages, dequantise, quantise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from dfadc.contract import ImageContract
    from dfadc.distillation.distillation import Distillation
    from dfadc.distillation.state import TrainingState
    from dfadc.run_folder import RunFolder
    from dfadc.training.run import Training
    from dfadc.verification.pixel_samples import Samples

#: Images in a generator or another network at once, at most.
ANSWER_BATCH = 128


def write_results(training: Training, folder: RunFolder, on_note: Callable[[str], None] = lambda _: None) -> None:
    """Writes all files that later stages start from; the same run gives the same bytes.

    Args:
        training: run to its end.
        folder: of the run.
        on_note: called with a line on what takes a while, and on what is not as the recipe asks.

    Raises:
        StorageFailed: a file could not be written.
    """
    run = training.run
    save_network(
        folder.student,
        run.state.student.average.eval(),
        architecture=training.student.architecture,
        stem=training.student.stem,
        contract=training.teacher.contract,
        extra={"dfadc.teacher_sha256": training.teacher.sha256, "dfadc.recipe": training.recipe.name},
    )
    _write_generator(run.state, run, folder.generator)
    prior_steps, adversary_steps = verification_steps(run.recipe)
    first = (
        f"a prior generator of {prior_steps} updates and samples of it" if needs_prior(run) else "procedural samples"
    )
    on_note(f"finishing: {first}, then {ADVERSARY_RESTARTS} adversaries of {adversary_steps}")
    prior = train_prior(run) if needs_prior(run) else None
    adversary = train_adversary(run)
    if prior is not None:
        _write_generator(prior, run, folder.prior)
    samples = freeze_samples(run, prior=prior, adversary=adversary)
    networks = {TEACHER_SHA256: training.teacher.sha256, STUDENT_SHA256: sha256_file(folder.student)}
    samples = replace(samples, provenance={**samples.provenance, **networks})
    samples.save(folder.samples)
    calibration = collect_calibration(run, prior=prior, exclude=samples)
    calibration.save(folder.calibration)
    for note in calibration.notes:
        on_note(f"calibration: {note}")


def freeze_samples(
    run: Distillation, *, prior: TrainingState | None = None, adversary: TrainingState | None = None
) -> Samples:
    """Draws the verification samples, quantises them, and then computes the logits of teacher and student, in fp32.

    Those of the averaged generator make up for a source that has none. All come from latents that no training saw.
    """
    recipe, contract = run.recipe, run.teacher.contract
    total = choose_num_samples(recipe.verify, contract)
    # Evenly over the moments of the run, should there be more than the file may hold.
    snapshots = run.state.snapshots
    num_snapshots = min(len(snapshots), recipe.verify.count_of("snapshots", total))
    snapshots = snapshots[torch.linspace(0, max(0, len(snapshots) - 1), num_snapshots).round().long()]
    most = _batch_size(run)
    num_prior, num_adversary = (recipe.verify.count_of(source, total) for source in ("prior", "adversary"))
    has_prior = prior is not None or not needs_prior(run)
    images = {
        "snapshots": _stored(snapshots.split(most), contract),
        "prior": _stored(draw_prior(run, prior, num_prior, most) if has_prior else (), contract),
        "adversary": _draw(run, adversary, num_adversary),
    }
    rest = total - sum(map(len, images.values()))
    images = {"generator": _draw(run, run.state, rest), **images}
    stored = np.concatenate(list(images.values()))
    source = np.repeat(np.arange(len(images), dtype=np.int8), [len(drawn) for drawn in images.values()])
    provenance = _provenance(run, len(images["prior"]))
    networks = (run.teacher.module, run.state.student.average)
    if contract.is_dense:
        positions = choose_positions(*contract.input_size[1:])
        teacher, student = (
            collect_dense(_answers(network, stored, run), positions, contract=contract, network="the network")
            for network in networks
        )
        return DenseSampleSet(
            stored, source, tuple(images), teacher, student, positions, contract, provenance=provenance
        )
    teacher_logits, student_logits = (_logits(network, stored, run) for network in networks)
    return SampleSet(stored, source, tuple(images), teacher_logits, student_logits, contract, provenance=provenance)


def _provenance(run: Distillation, prior_samples: int) -> dict[str, str | int | float]:
    """Provenance of the samples: seeds, generator updates and refinement steps."""
    recipe = run.recipe
    prior_steps, adversary_steps = verification_steps(recipe)
    refined = refine_steps(recipe, prior_samples) if prior_samples and can_refine(run) else 0
    share = PROCEDURAL_SHARE if refined else 0.0
    return {
        "seed": recipe.seed,
        "step": run.state.step,
        **({"prior_steps": prior_steps} if needs_prior(run) else {}),
        "prior_seed": PRIOR_SEED,
        "sharpen_steps": refined,
        "procedural_share": share if needs_prior(run) else 1.0,
        "adversary_steps": adversary_steps,
        "adversary_restarts": ADVERSARY_RESTARTS,
    }


def collect_calibration(run: Distillation, *, prior: TrainingState | None, exclude: Samples) -> Calibration:
    """Images for INT8 of the whole run, of the final generator and of the prior generator; none of the samples."""
    settings, contract, reservoir = run.recipe.calibration, run.teacher.contract, run.state.reservoir
    # Twice what is asked for, so that the classes can be balanced.
    wanted = 2 * settings.num_images
    candidates = {
        "reservoir": _stored(reservoir.images[: len(reservoir)].cpu().split(_batch_size(run)), contract),
        "generator": _draw(run, run.state, wanted),
        "prior": _draw(run, prior, wanted) if needs_prior(run) else _draw_procedural(run, wanted),
    }
    answers = _classes_of_images(candidates, run)
    return choose_calibration(
        candidates, answers, num_images=settings.num_images, exclude=exclude.images, task=contract.task
    )


def _draw(run: Distillation, state: TrainingState | None, count: int) -> StoredImages:
    """``count`` images as they are stored; none where there is no such generator."""
    return _stored(() if state is None else draw(state, count, _batch_size(run)), run.teacher.contract)


def _draw_procedural(run: Distillation, count: int) -> StoredImages:
    """``count`` procedural images of balanced classes, as they are stored; others than the samples."""
    drawn = draw_balanced(count, run.teacher, torch.Generator().manual_seed(run.recipe.seed + 3))
    return _stored(drawn.split(_batch_size(run)), run.teacher.contract)


def _batch_size(run: Distillation) -> int:
    """Images that are drawn or answered at once."""
    return batch_size(run.teacher.contract, min(ANSWER_BATCH, run.teacher.placement.images_at_once))


def _stored(batches: Iterable[Tensor], contract: ImageContract) -> StoredImages:
    """Normalised batches (n, C, H, W) as they are stored, a batch at a time: floats take four times the memory."""
    nothing = np.empty((0, *contract.input_size), np.float32)
    return np.concatenate([quantise(images, contract) for images in (nothing, *(b.float().numpy() for b in batches))])


def _classes_of_images(candidates: Mapping[str, StoredImages], run: Distillation) -> dict[str, npt.NDArray[np.float32]]:
    """Logits (N, K) of each source by which calibration images are balanced over the classes.

    A dense teacher gives an image many classes: the highest is then the one that the image shows most of beside what
    all images show of it, for nearly every image shows more background than anything else.
    """
    if not run.teacher.contract.is_dense:
        return {name: _logits(run.teacher.module, images, run) for name, images in candidates.items()}
    shares = {name: _class_shares(images, run) for name, images in candidates.items()}
    mean = np.concatenate(list(shares.values())).mean(axis=0)
    return {name: found / np.maximum(mean, 1e-6) for name, found in shares.items()}


def _class_shares(stored: StoredImages, run: Distillation) -> npt.NDArray[np.float32]:
    """(N, K) share of each image's pixels that the teacher puts into each class."""
    num_classes = run.teacher.contract.num_classes
    shares = [np.empty((0, num_classes), np.float32)]
    for logits in _answers(run.teacher.module, stored, run):
        classes = logits.argmax(axis=1)
        shares.append(np.stack([(classes == index).mean(axis=(1, 2)) for index in range(num_classes)], axis=1))
    return np.concatenate(shares).astype(np.float32)


def _logits(network: nn.Module, stored: StoredImages, run: Distillation) -> npt.NDArray[np.float32]:
    """Logits (N, K) in fp32 to images as they are stored."""
    return np.concatenate(
        [np.empty((0, run.teacher.contract.num_classes), np.float32), *_answers(network, stored, run)]
    )


@torch.no_grad()
def _answers(network: nn.Module, stored: StoredImages, run: Distillation) -> Iterator[npt.NDArray[np.float32]]:
    """Batches of logits (n, K) or, at the images' size, (n, K, H, W), in fp32 to images as they are stored."""
    answering = answering_pixels(network, run.teacher.contract).eval()
    size = _batch_size(run)
    for start in range(0, len(stored), size):
        images = torch.from_numpy(dequantise(stored[start : start + size], run.teacher.contract))
        with full_fp32(run.policy.device):
            logits = answering(images.to(run.policy.device)).float()
        yield logits.cpu().numpy()


def _write_generator(state: TrainingState, run: Distillation, path: Path) -> None:
    metadata = {
        "dfadc.schema": "1",
        "dfadc.generator": state.generator.rules.model_dump_json(),
        "dfadc.bounded": json.dumps(draws_pixels(run.recipe.generator, run.teacher.contract)),
        "dfadc.contract": json.dumps(run.teacher.contract.to_dict(), sort_keys=True),
    }
    atomic_write_bytes(path, serialise(state.generator.average.state_dict(), metadata))
