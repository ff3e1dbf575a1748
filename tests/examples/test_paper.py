"""The papers' experiments: their settings, their networks at full size, one step of each, and their scripts."""

from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torchvision
from command_line import run_command, run_script, settings
from miniature import as_teacher, resolve
from PIL import Image
from torch import nn

from dfadc.contract import ImageContract
from dfadc.distillation.compute.policy import choose_policy
from dfadc.distillation.distillation import Distillation
from dfadc.distillation.generator.networks import build_generator
from dfadc.distillation.loop import StepLosses, distill
from dfadc.distillation.state import TrainingState
from dfadc.distillation.trainable import rate_factor
from dfadc.errors import DfadcError
from dfadc.networks.logits import with_logits
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import load_network, save_network
from dfadc.networks.norm_layers import is_batch_norm_with_statistics
from dfadc.recipe.load import load_recipe
from dfadc.student.build import build_student, check_fits, logit_size, with_logits_like

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "paper"
sys.path.insert(0, str(EXAMPLE))

from experiments import (  # noqa: E402 -- the example's folder is no package
    DATASETS,
    EXPERIMENTS,
    FIELD,
    PAPER,
    Dataset,
    Experiment,
    TeacherTraining,
    commands,
    find_experiment,
    read_results,
    tables,
)
from labelled_images import NO_CLASS, read_split  # noqa: E402
from train_paper_teacher import augment, normalise  # noqa: E402
from train_paper_teacher import main as train  # noqa: E402
from write_evaluation import main as write_evaluation  # noqa: E402

if TYPE_CHECKING:
    from command_line import Outcome
    from conftest import Digits
    from numpy.typing import NDArray

    from dfadc.recipe.schema import Recipe

#: Steps, batch, student's rate and decay, generator's rate, latents; then epochs at which both rates fall, and to what.
SETTINGS = {
    "mnist": (2_000, 512, 0.01, 1e-4, 1e-3, 100, (), 1.0),
    "cifar10": (25_000, 256, 0.1, 5e-4, 1e-3, 256, (100, 200), 0.1),
    "cifar100": (25_000, 256, 0.1, 5e-4, 1e-3, 256, (100, 200), 0.1),
    "caltech101": (15_000, 64, 0.05, 5e-4, 1e-3, 256, (100, 200), 0.1),
    "camvid": (15_000, 64, 0.1, 5e-4, 1e-3, 256, (100, 200), 0.1),
    "nyuv2": (15_000, 64, 0.1, 5e-5, 1e-3, 256, (100, 200), 0.3),
}
STEPS_PER_EPOCH = 50


def name_of(experiment: Experiment) -> str:
    return experiment.name


def differences(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    ours, theirs = flat(one.model_dump()), flat(other.model_dump())
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


# --------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recipe_has_the_papers_settings(name: str) -> None:
    steps, batch_size, rate, weight_decay, generator_rate, latent_dim, epochs, decay = SETTINGS[name]
    recipe = load_recipe(EXAMPLE / f"{name}.toml")
    student, generator = recipe.student, recipe.generator
    assert (recipe.name, recipe.steps, recipe.batch_size) == (name, steps, batch_size)
    assert (student.optimizer.learning_rate, student.optimizer.weight_decay) == (rate, weight_decay)
    assert (generator.optimizer.learning_rate, generator.latent_dim) == (generator_rate, latent_dim)
    assert generator.schedule == "as_student"
    schedule, fallen = student.schedule, 1.0
    assert rate_factor(schedule, 0) == 1
    for epoch in epochs:
        step = epoch * STEPS_PER_EPOCH
        assert rate_factor(schedule, (step - 1) / steps) == pytest.approx(fallen)
        fallen *= decay
        assert rate_factor(schedule, step / steps) == pytest.approx(fallen)
    assert rate_factor(schedule, (steps - 1) / steps) == pytest.approx(fallen)
    dense = DATASETS[name].contract.task == "segmentation"
    assert generator.discrepancy == ("log_l1" if dense else "l1")


def test_recipes_that_are_the_same_do_not_part() -> None:
    """Each holds all its settings to be read in one place; what they share with a shipped one they share for good."""
    cifar = load_recipe(EXAMPLE / "cifar10.toml")
    assert set(differences(cifar, load_recipe(EXAMPLE / "cifar100.toml"))) == {"name", "description"}
    assert set(differences(cifar, load_recipe("dfad"))) == {"name", "description"}
    dense = differences(load_recipe(EXAMPLE / "camvid.toml"), load_recipe("dfad-seg"))
    # The paper's generator of large images is B.
    assert dense.pop("generator.architecture") == ("paper", "paper_b")
    assert set(dense) == {"name", "description"}


def test_every_recipe_belongs_to_a_data_set() -> None:
    assert {path.stem for path in EXAMPLE.glob("*.toml")} - {"results"} == set(DATASETS)
    assert all(experiment.recipe.is_file() for experiment in EXPERIMENTS.values())


# ----------------------------------------------------------------------------------------- networks and a first step


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=name_of)
def test_networks_and_generator_are_built_at_full_size(experiment: Experiment) -> None:
    contract = DATASETS[experiment.dataset].contract
    networks = [build_architecture(name, contract, device="meta") for name in (experiment.teacher, experiment.student)]
    for network in networks:
        assert check_fits(network, contract) > 0
        assert all(parameter.is_meta for parameter in network.module.parameters())
    recipe = load_recipe(experiment.recipe)
    with torch.device("meta"):
        generator = build_generator(recipe.generator, contract)
        images = generator(torch.empty(2, recipe.generator.latent_dim))
    assert images.shape == (2, *contract.input_size)


@pytest.mark.parametrize("teacher", ["resnet50", "timm:resnet50", "timm:convnext_tiny", "timm:vit_small_patch16_224"])
def test_teachers_and_students_of_imagenet_size_are_built(teacher: str) -> None:
    pytest.importorskip("timm")
    contract = ImageContract((3, 224, 224), 1000)
    sizes = [
        check_fits(build_architecture(name, contract, device="meta"), contract) for name in (teacher, "mobilenetv2")
    ]
    assert sizes[1] < sizes[0] / 4


def first_step(experiment: Experiment, *overrides: str) -> StepLosses:
    """A step of the experiment as it is, but for what is overridden, with a teacher of random weights."""
    contract = DATASETS[experiment.dataset].contract
    torch.manual_seed(0)
    teacher = with_logits(build_architecture(experiment.teacher, contract).module, contract)
    teacher = teacher.eval().requires_grad_(requires_grad=False)
    size = logit_size(teacher, contract) if experiment.is_dense else ()
    student = with_logits_like(build_student(experiment.student, contract), contract, size).module
    batch_norms: list[nn.Module] = [layer for layer in teacher.modules() if is_batch_norm_with_statistics(layer)]
    recipe = resolve(load_recipe(experiment.recipe, overrides), contract, len(batch_norms))
    policy = choose_policy(recipe.compute, torch.device("cpu"))
    generator = build_generator(recipe.generator, contract)
    state = TrainingState(student, generator, recipe=recipe, contract=contract, policy=policy)
    loaded = as_teacher(teacher, contract).placed(policy.placement(0))
    run = Distillation(loaded, batch_norms, state, recipe=recipe, policy=policy)
    before = [parameter.detach().clone() for parameter in (*student.parameters(), *generator.parameters())]
    losses: list[StepLosses] = []
    with run:
        distill(run, 1, losses.append)
    after = [*student.parameters(), *generator.parameters()]
    moved = sum(not torch.equal(now, was) for now, was in zip(after, before, strict=True))
    assert moved > 0.9 * len(before)
    return losses[0]


#: Both dense experiments have the same networks, and so have both of CIFAR. By default one of each is played, and of
#: the large images those of a dense one.
SLOW_AT_TWO = {"nyuv2", "cifar100", "caltech101"}


@pytest.mark.example
@pytest.mark.parametrize(
    "experiment",
    [pytest.param(each, marks=pytest.mark.slow if name_of(each) in SLOW_AT_TWO else ()) for each in PAPER],
    ids=name_of,
)
def test_the_first_step_at_a_batch_of_two(experiment: Experiment) -> None:
    losses = first_step(experiment, "batch_size=2")
    assert torch.isfinite(losses.student_loss)
    assert float(losses.generator_loss) < 0


@pytest.mark.slow
@pytest.mark.parametrize("experiment", FIELD, ids=name_of)
def test_the_first_step_of_the_fields_pairs_at_a_batch_of_two(experiment: Experiment) -> None:
    assert torch.isfinite(first_step(experiment, "batch_size=2").student_loss)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", PAPER, ids=name_of)
def test_the_first_step_at_the_papers_batch(experiment: Experiment) -> None:
    assert torch.isfinite(first_step(experiment).student_loss)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=name_of)
def test_the_command_line_goes_from_a_teacher_to_onnx(experiment: Experiment, tmp_path: Path) -> None:
    """One step teaches nothing, so the gate fails; the student is exported all the same."""
    contract = DATASETS[experiment.dataset].contract
    torch.manual_seed(0)
    teacher = build_architecture(experiment.teacher, contract)
    with torch.no_grad():
        for _ in range(3):  # batch norms of random weights that have seen some images
            teacher.module.train()(torch.randn(4, *contract.input_size))
    path, run = tmp_path / "teacher.safetensors", tmp_path / "run"
    save_network(path, teacher.module, architecture=teacher.name, stem=teacher.stem, contract=contract)
    few = {"batch_size": 2, "verify.num_samples": 48, "calibration.num_images": 8}
    outcome = run_command(
        *("distill", path, "--student", experiment.student, "--recipe", experiment.recipe, "--steps", 1),
        *(*settings(few), "-e", "onnx", "--out", run),
    )
    assert outcome.code in {0, 3}, outcome.err
    assert (run / "artifacts" / "student.onnx").stat().st_size > 10_000


# ---------------------------------------------------------------------------------------------------- reading images


def some_pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.fixture
def mnist_folder(digits_split: tuple[Digits, Digits], tmp_path: Path) -> Path:
    """Scikit-learn's digits, tripled and framed to 28 px, as torchvision lays out MNIST."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for digits, prefix in zip(digits_split, ("train", "t10k"), strict=True):
        images = np.pad(digits.images[:, 0].repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
        for name, values in (("images-idx3", images), ("labels-idx1", digits.labels.astype(np.uint8))):
            header = bytes((0, 0, 8, values.ndim)) + b"".join(side.to_bytes(4, "big") for side in values.shape)
            (raw / f"{prefix}-{name}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    return tmp_path


@pytest.mark.parametrize(("name", "key"), [("cifar10", b"labels"), ("cifar100", b"fine_labels")])
def test_cifar_is_read_as_torchvision_lays_it_out(
    name: str, key: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision checks the sums of the real files: the synthetic ones have their own."""
    kind = getattr(torchvision.datasets, DATASETS[name].torchvision)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = some_pixels(6, 3, 32, 32)
    for split, rows in (("train_list", slice(0, 4)), ("test_list", slice(4, 6))):
        labels = list(range(6))[rows]
        content = pickle.dumps({"data": pixels[rows].reshape(-1, 3072), key.decode(): labels})
        (folder / "batch").with_suffix(f".{split}").write_bytes(content)
        monkeypatch.setattr(kind, split, [[f"batch.{split}", hashlib.md5(content).hexdigest()]])  # noqa: S324
    meta = pickle.dumps({kind.meta["key"]: [str(number) for number in range(6)]})
    (folder / kind.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(meta).hexdigest()})  # noqa: S324
    train_split, test_split = (read_split(DATASETS[name], split, tmp_path) for split in ("train", "test"))
    assert train_split.images.numpy().tolist() == pixels[:4].tolist()
    assert test_split.images.numpy().tolist() == pixels[4:].tolist()
    assert test_split.labels.tolist() == [4, 5]


def test_caltech101_is_split_and_brought_to_size(tmp_path: Path) -> None:
    # torchvision leaves the background out.
    (tmp_path / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").mkdir(parents=True)
    for name in ("accordion", "airplanes", "anchor"):
        folder = tmp_path / "caltech101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        for number in range(1, 5):
            Image.fromarray(some_pixels(70, 150, 3)).save(folder / f"image_{number:04d}.jpg")
        (tmp_path / "caltech101" / "Annotations" / name).mkdir(parents=True)
    splits = [read_split(DATASETS["caltech101"], split, tmp_path) for split in ("train", "test")]
    assert [len(split.labels) for split in splits] == [9, 3]
    assert all(split.images.shape[1:] == (3, 128, 128) for split in splits)
    assert sorted([*splits[0].labels.tolist(), *splits[1].labels.tolist()]) == [0] * 4 + [1] * 4 + [2] * 4


def test_a_folder_of_class_folders_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in range(10):
            (tmp_path / split / str(label)).mkdir(parents=True)
            Image.fromarray(np.full((40, 32, 3), 20 * label, np.uint8)).save(tmp_path / split / str(label) / "a.png")
    found = read_split(DATASETS["cifar10"], "test", tmp_path)
    assert found.labels.tolist() == list(range(10))
    assert found.images[:, 0, 0, 0].tolist() == [20 * label for label in range(10)]


def write_scenes(images: Path, masks: Path, *, count: int = 3, values: tuple[int, ...] = (0, 1, 12)) -> None:
    """Scenes of 90x160 px in vertical stripes, one for each mask value."""
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    stripes = np.repeat(np.array(values, np.uint8), -(-160 // len(values)))[:160]
    mask = np.tile(stripes, (90, 1))
    for number in range(count):
        scene = np.stack([mask * 15, 255 - mask * 15, some_pixels(90, 160)], axis=-1)
        Image.fromarray(scene.astype(np.uint8)).save(images / f"{number}.png")
        Image.fromarray(mask).save(masks / f"{number}.png")


@pytest.mark.parametrize("layout", [("{}/images", "{}/masks"), ("{}", "{}annot")], ids=["ours", "CamVid's"])
def test_masks_are_read_with_their_images(layout: tuple[str, str], tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_scenes(*(tmp_path / place.format(split) for place in layout))
    camvid, nyuv2 = (read_split(DATASETS[name], "test", tmp_path) for name in ("camvid", "nyuv2"))
    assert camvid.images.shape == (3, 3, 128, 128)
    assert camvid.labels.shape == (3, 128, 128)
    # CamVid's classes are 0 to 10, NYUv2's are written as 1 to 13; all else is no class.
    assert set(camvid.labels.flatten().tolist()) == {0, 1, NO_CLASS}
    assert set(nyuv2.labels.flatten().tolist()) == {NO_CLASS, 0, 11}
    # A stripe's colour lies under its class, but for its edges, which are blended.
    assert (camvid.images[:, 0][camvid.labels == 1] == 15).float().mean() > 0.8
    assert (camvid.images[:, 0][camvid.labels == 0] == 0).float().mean() > 0.8


def spoil(folder: Path, how: str) -> None:
    images, masks = folder / "test" / "images", folder / "test" / "masks"
    write_scenes(images, masks)
    if how == "no mask":
        (masks / "1.png").unlink()
    elif how == "other size":
        Image.new("L", (10, 10)).save(masks / "1.png")
    elif how == "colours":
        Image.new("RGB", (160, 90)).save(masks / "1.png")
    elif how == "no folder":
        masks.rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("no mask", "masks without an image: 1"),
        ("other size", r"1.png is \(10, 10\), its image \(160, 90\)"),
        ("colours", "not a class number for each pixel"),
        ("no folder", "there is neither"),
    ],
)
def test_masks_that_do_not_fit_are_refused(how: str, problem: str, tmp_path: Path) -> None:
    spoil(tmp_path, how)
    with pytest.raises(DfadcError, match=problem) as caught:
        read_split(DATASETS["camvid"], "test", tmp_path)
    assert caught.value.hint


def test_data_that_are_not_there_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="does not hold MNIST"):
        read_split(DATASETS["mnist"], "test", tmp_path)
    with pytest.raises(DfadcError, match="torchvision does not have"):
        read_split(DATASETS["camvid"], "test", None)


# -------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.example
def test_a_teacher_is_trained_and_its_test_images_are_written(mnist_folder: Path, tmp_path: Path) -> None:
    teacher, test = tmp_path / "teacher.safetensors", tmp_path / "out" / "test.npz"
    train("mnist", out=teacher, data=mnist_folder, epochs=6, batch_size=32, device="cpu")
    module, metadata = load_network(teacher)
    assert metadata.architecture == "lenet5"
    assert "6 epochs, batch 32, seed 0" in metadata.extra["dfadc.training"]
    write_evaluation("mnist", out=test, data=mnist_folder)
    with np.load(test) as data, torch.no_grad():
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
        assert images.shape[1:] == (1, 32, 32)
        accuracy = (module.eval()(normalise(images, metadata.contract)).argmax(1) == labels).double().mean()
    assert accuracy > 0.8  # images and labels belong together


@pytest.mark.example
def test_a_dense_teacher_is_trained_and_its_masks_are_written(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_scenes(tmp_path / split / "images", tmp_path / split / "masks", count=2)
    teacher, test = tmp_path / "teacher.safetensors", tmp_path / "test.npz"
    train("camvid", out=teacher, data=tmp_path, epochs=1, batch_size=2, device="cpu")
    assert load_network(teacher)[1].contract == DATASETS["camvid"].contract
    write_evaluation("camvid", out=test, data=tmp_path)
    with np.load(test) as data:
        assert data["images"].shape == (2, 3, 128, 128)
        assert data["masks"].shape == (2, 128, 128)
        assert data["masks"].dtype == np.uint8


def test_images_and_masks_move_together() -> None:
    masks = torch.from_numpy(some_pixels(4, 16, 12)).long() % 7
    images = masks[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
    torch.manual_seed(0)
    moved, moved_masks = augment(images, masks, TeacherTraining(1, 4, 0.1, shift=3, flip=True))
    inside = moved_masks != NO_CLASS
    assert inside.double().mean() > 0.5
    assert torch.equal(moved[:, 0].long()[inside], moved_masks[inside])
    assert not torch.equal(moved, images)
    still, same = augment(images, masks, TeacherTraining(1, 4, 0.1))
    assert torch.equal(still, images)
    assert torch.equal(same, masks)


# -------------------------------------------------------------------------------------------- the table and commands


def test_the_readme_has_the_tables_as_they_are() -> None:
    readme = (ROOT / "docs" / "results" / "published.md").read_text(encoding="utf-8")
    assert "\n".join(tables(read_results())) in readme


def test_runs_are_averaged_over_seeds_and_empty_cells_stay_empty() -> None:
    run = {"experiment": "mnist", "recipe": "mnist", "teacher": 98.9, "commit": "abc", "device": "a GPU"}
    lines = list(tables([{**run, "seed": 0, "student": 98.0}, {**run, "seed": 1, "student": 98.2}]))
    row = next(line for line in lines if line.startswith("| mnist "))
    assert row.endswith("| 98.3 ± 0.2 | 98.90 | 98.10 ± 0.14 | 2 | abc | a GPU |")
    assert next(line for line in lines if line.startswith("| caltech101 ")).endswith("| 73.5 ± 0.8 |  |  |  |  |  |")


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=name_of)
def test_an_experiment_is_one_command_each(experiment: Experiment) -> None:
    teacher, test, student, verdict = (command.split() for command in commands(experiment, seed=3))
    assert all((ROOT / command[1]).is_file() for command in (teacher, test))
    assert (ROOT / student[student.index("--recipe") + 1]).is_file()
    assert student[student.index("--student") + 1] == experiment.student
    assert verdict == ["dfadc", "verify", student[-1], "--data", test[-1]]


def test_the_command_line_names_the_experiments() -> None:
    def ask(*words: str) -> Outcome:
        return run_script(EXAMPLE / "experiments.py", *words)

    assert ask("nyuv2").out.splitlines() == list(commands(EXPERIMENTS["nyuv2"]))
    unknown = ask("imagenet")
    assert unknown.code == 2
    assert "unknown experiment 'imagenet'" in unknown.err
    assert "Traceback" not in unknown.err
    with pytest.raises(DfadcError, match="unknown experiment"):
        find_experiment("")


def test_what_a_data_set_is_fits_its_contract() -> None:
    for dataset in DATASETS.values():
        assert isinstance(dataset, Dataset)
        assert isinstance(dataset.contract, ImageContract)
        assert dataset.contract.has_pixels
        assert not dataset.torchvision or hasattr(torchvision.datasets, dataset.torchvision)
