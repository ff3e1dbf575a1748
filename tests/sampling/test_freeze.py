"""From a finished run to files: what is exported, and what the samples are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dfadc.contract import ImageContract
from dfadc.distillation.generator.networks import build_generator
from dfadc.networks.network_file import load_network, save_network
from dfadc.networks.zoo.compact_resnet import CompactResNet
from dfadc.pipeline.distill import run_distillation
from dfadc.recipe.load import change_recipe, load_recipe
from dfadc.recipe.schema import GeneratorSettings
from dfadc.run_folder import RunFolder
from dfadc.sampling.freeze import freeze_samples, write_results
from dfadc.teacher.load import load_teacher
from dfadc.training import sample_size
from dfadc.training.build import prepare
from dfadc.training.callbacks import draw_snapshot_samples
from dfadc.verification.samples import SampleSet

if TYPE_CHECKING:
    from dfadc.training.run import Training

LENET5 = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "teacher_lenet5.safetensors"
WITH_PIXELS = ImageContract((1, 8, 8), 10, mean=(0.3,), std=(0.4,))
WITHOUT_PIXELS = ImageContract((1, 8, 8), 10)
MINIATURE: dict[str, Any] = {
    "steps": 4,
    "batch_size": 8,
    "student.steps": 2,
    "generator.latent_dim": 8,
    "replay.capacity": 24,
    "calibration.num_images": 80,
    "verify.num_samples": 40,
    "compute.compile": "off",
}


def train(folder: Path, contract: ImageContract = WITH_PIXELS) -> tuple[Training, RunFolder]:
    """A run of a few steps, trained to its end."""
    torch.manual_seed(0)
    network = CompactResNet(contract, width=8)
    with torch.no_grad():
        network(torch.randn(64, 1, 8, 8))
        network(torch.randn(64, 1, 8, 8))
    path = folder / "teacher.safetensors"
    save_network(path, network, architecture="compact_resnet_8", stem="default", contract=contract)
    recipe = change_recipe(load_recipe("auto"), MINIATURE)
    training = prepare(load_teacher(path), "compact_resnet_4", recipe=recipe, device="cpu").__enter__()
    run = RunFolder(folder / "run")
    run.checkpoints.mkdir(parents=True)
    training.train(run, lambda _: None)
    return training, run


def test_the_averaged_student_is_exported(tmp_path: Path) -> None:
    """Not the network that moves, and nothing that was selected."""
    training, run = train(tmp_path)
    write_results(training, run)
    module, metadata = load_network(run.student)
    state = training.run.state
    moved = []
    for name, value in module.state_dict().items():
        assert torch.equal(value, state.student.average.state_dict()[name]), name
        moved.append(not torch.equal(value, state.student.module.state_dict()[name]))
    assert any(moved)
    assert metadata.extra["dfadc.recipe"] == "auto"
    assert metadata.extra["dfadc.teacher_sha256"] == training.teacher.sha256


def test_the_generators_file_is_all_it_takes_to_draw_again(tmp_path: Path) -> None:
    training, run = train(tmp_path)
    write_results(training, run)
    with safe_open(run.generator, framework="pt") as file:
        metadata = file.metadata()
    contract = ImageContract.from_dict(json.loads(metadata["dfadc.contract"]))
    settings = GeneratorSettings.model_validate_json(metadata["dfadc.generator"])
    rebuilt = build_generator(settings, contract, bounded=json.loads(metadata["dfadc.bounded"])).eval()
    rebuilt.load_state_dict(load_file(run.generator))
    latents = torch.randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(latents), training.run.state.generator.average.eval()(latents))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    runs = []
    for name in ("one", "other"):
        training, run = train(tmp_path / name)
        write_results(training, run)
        runs.append(run)
    for file in (
        *("student.safetensors", "generator.safetensors", "prior.safetensors"),
        *("calibration.npz", "samples.npz"),
    ):
        assert (runs[0].path / file).read_bytes() == (runs[1].path / file).read_bytes(), file


@pytest.mark.parametrize("contract", [WITH_PIXELS, WITHOUT_PIXELS], ids=["pixels", "no pixels"])
def test_both_networks_answer_the_images_as_they_are_stored(contract: ImageContract, tmp_path: Path) -> None:
    """Quantised first, asked second, in fp32: what is stored is what was answered."""
    training, run = train(tmp_path, contract)
    write_results(training, run)
    samples = SampleSet.load(run.samples)
    assert samples.images.dtype == (np.uint8 if contract.has_pixels else np.float16)
    assert samples.counts() == {"generator": 10, "snapshots": 4, "prior": 20, "adversary": 6}
    images = torch.from_numpy(samples.normalised())
    networks = (load_teacher(tmp_path / "teacher.safetensors").module, load_network(run.student)[0])
    for network, stored in zip(networks, (samples.teacher_logits, samples.student_logits), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(network(images), torch.from_numpy(stored), rtol=1e-4, atol=1e-4)


def test_without_snapshots_every_sample_is_the_last_generators(tmp_path: Path) -> None:
    training, _ = train(tmp_path)
    training.run.state.snapshots = training.run.state.snapshots[:0]
    samples = freeze_samples(training.run)
    assert samples.counts() == {"generator": 40, "snapshots": 0, "prior": 0, "adversary": 0}


def test_as_many_samples_are_frozen_as_the_gates_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_size, "FILE_BYTES", 2**10)
    training, _ = train(tmp_path)
    wanted = {"verify.num_samples": 4000, "verify.min_fp16_agreement": 0.9}
    training.run.recipe = change_recipe(training.recipe, wanted)
    count = sample_size.choose_num_samples(training.run.recipe.verify, training.run.teacher.contract)
    assert count < 4000
    assert len(freeze_samples(training.run)) == count


def test_of_too_many_snapshot_samples_an_even_choice_is_kept(tmp_path: Path) -> None:
    training, _ = train(tmp_path)
    draw_snapshot_samples(training.run, 60)
    snapshots = training.run.state.snapshots
    samples = freeze_samples(training.run)
    assert samples.counts() == {"generator": 34, "snapshots": 6, "prior": 0, "adversary": 0}
    kept = samples.normalised()[samples.source == 1]
    for stored, shown in ((kept[0], snapshots[0]), (kept[-1], snapshots[-1])):
        # Half a pixel step of 1 / 255, in standard deviations.
        np.testing.assert_allclose(stored, shown.float().clamp(-0.75, 1.75).numpy(), atol=0.5 / 255 / 0.4 + 1e-3)


def test_calibration_images_come_from_three_sources_and_are_none_of_the_samples(tmp_path: Path) -> None:
    training, run = train(tmp_path)
    notes: list[str] = []
    write_results(training, run, notes.append)
    with np.load(run.calibration, allow_pickle=False) as stored:
        images, source, sources = stored["images"], stored["source"], stored["sources"].tolist()
    assert images.dtype == np.uint8
    assert sources == ["reservoir", "generator", "prior"]
    # The reservoir holds 32 images where 40 are its share: the generator fills up, and that is said.
    assert np.bincount(source).tolist() == [32, 28, 20]
    assert notes[1:] == ["calibration: reservoir: 32 usable images, 40 wanted"]
    samples = SampleSet.load(run.samples).images
    assert {image.tobytes() for image in images}.isdisjoint(image.tobytes() for image in samples)


def test_freezing_draws_unseen_latents_and_moves_no_player(tmp_path: Path) -> None:
    training, _ = train(tmp_path)
    state = training.run.state
    before = {name: value.clone() for name, value in state.student.module.state_dict().items()}
    latents = state.latent_rng.get_state()
    freeze_samples(training.run)
    assert torch.equal(state.latent_rng.get_state(), latents)
    assert all(torch.equal(value, before[name]) for name, value in state.student.module.state_dict().items())


def test_without_batch_norm_the_gate_asks_what_the_teacher_is_sure_of(tmp_path: Path) -> None:
    """Refined procedural images; no prior generator is trained."""
    teacher = load_teacher(LENET5)
    for steps in (0, 40):
        path = tmp_path / f"run_{steps}"
        # Of 100 images that are drawn by rule one is an ankle boot to this teacher.
        recipe = change_recipe(load_recipe("auto"), {**MINIATURE, "steps": steps, "verify.num_samples": 192})
        run_distillation(teacher, "lenet5_half", out=path, recipe=recipe)
        samples = SampleSet.load(path / "samples.npz")
        assert "prior_steps" not in samples.provenance
        assert samples.provenance["procedural_share"] == 1.0
        assert not (path / "prior.safetensors").exists()
        logits = samples.teacher_logits[samples.of_source("prior")]
        surest = np.exp(logits - logits.max(axis=1, keepdims=True))
        assert (1 / surest.sum(axis=1)).mean() > 0.8
        assert len(np.unique(logits.argmax(axis=1))) == 10
