"""Runs on the level of :class:`Training`: exact resume, plans, readings, snapshot samples."""

from __future__ import annotations

import copy
import json
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import save_untrained_teacher
from states import assert_same_state
from torch import Tensor, nn

from dfadc.contract import ContractFields, ImageContract
from dfadc.distillation.loop import distill
from dfadc.errors import DfadcError, Interrupted
from dfadc.networks.network_file import save_network
from dfadc.recipe.load import change_recipe, load_recipe, recipe_names
from dfadc.run_lock import claim_folder
from dfadc.sampling.freeze import write_results
from dfadc.teacher.load import Teacher, load_teacher
from dfadc.training.build import prepare
from dfadc.training.callbacks import NUM_SNAPSHOTS, Reading, draw_snapshot_samples, snapshot_size, snapshot_steps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dfadc.recipe.schema import Recipe
    from dfadc.run_folder import RunFolder
    from dfadc.training.plan import Plan
    from dfadc.training.run import Training

CONTRACT = ImageContract((1, 8, 8), 10, mean=(0.3,), std=(0.4,))
STUDENT = f"{__name__}:DropoutNetwork"
STEPS = 6
#: Laid over every recipe: seconds become milliseconds.
MINIATURE: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "student.steps": 2,
    "generator.latent_dim": 8,
    "replay.capacity": 24,
    "verify.num_samples": 32,
    "log.interval": 1,
    "compute.compile": "off",
}


class DropoutNetwork(nn.Module):
    """A student that draws from torch's global stream of random numbers in every update."""

    def __init__(self, contract: ImageContract) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(contract.channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(6 * 36, contract.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.dropout(self.features(images)))
        return logits


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained_teacher(tmp_path_factory.mktemp("teacher"), CONTRACT)


@pytest.fixture
def teacher(teacher_file: Path) -> Teacher:
    return load_teacher(teacher_file)


def miniature(name: str = "auto", changes: dict[str, Any] | None = None) -> Recipe:
    return change_recipe(load_recipe(name), {**MINIATURE, **(changes or {})})


def begin(teacher: Teacher, out: Path, recipe: Recipe) -> tuple[Training, RunFolder]:
    training = prepare(teacher, STUDENT, recipe=recipe, device="cpu").__enter__()
    folder = claim_folder(out, force=False)
    training.start(folder, training.plan())
    return training, folder


def go_on(teacher_file: Path, folder: RunFolder) -> tuple[Training, Plan]:
    """As another process would: everything from files, with other random numbers drawn before."""
    torch.manual_seed(4711)
    torch.rand(7)
    training = prepare(
        load_teacher(teacher_file), STUDENT, recipe=load_recipe(folder.recipe), device="cpu", has_checkpoint=True
    ).__enter__()
    return training, training.resume(folder)


# --------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(("name", "precision"), [("auto", "bf16"), ("auto", "fp32"), ("dfad", "fp32")])
def test_three_steps_and_three_more_are_six_bit_for_bit(
    name: str, precision: str, teacher_file: Path, tmp_path: Path
) -> None:
    recipe = miniature(name, {"compute.precision": precision})
    whole, whole_folder = begin(load_teacher(teacher_file), tmp_path / "whole", recipe)
    whole.train(whole_folder, lambda _: None)

    first, folder = begin(load_teacher(teacher_file), tmp_path / "halves", recipe)

    def stop_at_three(reading: Reading) -> None:
        if reading.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="interrupted at step 3 of 6") as caught:
        first.train(folder, stop_at_three)
    assert str(folder.path) in caught.value.hint

    second, plan = go_on(teacher_file, folder)
    assert plan.notes[-1] == "going on from step 3 of 6"
    second.train(folder, lambda _: None)

    assert_same_state(second.run.state.state_dict(), whole.run.state.state_dict())
    for training, run in ((whole, whole_folder), (second, folder)):
        write_results(training, run)
    for file in ("student.safetensors", "generator.safetensors", "calibration.npz", "samples.npz"):
        assert (folder.path / file).read_bytes() == (whole_folder.path / file).read_bytes(), file
    assert losses(folder) == losses(whole_folder)


def losses(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of the metrics without what a clock says."""
    timed = ("images_per_second", "seconds_left")
    return [{name: value for name, value in line.items() if name not in timed} for line in folder.read_metrics()]


def test_a_run_resumed_after_a_rollback_is_the_run_that_was_not_interrupted(teacher_file: Path, tmp_path: Path) -> None:
    def play(out: Path, stop_at: int | None) -> tuple[Training, RunFolder]:
        training, folder = begin(load_teacher(teacher_file), out, miniature("auto", {"steps": 8}))
        if stop_at is None:
            training.train(folder, spoiler(training))
            return training, folder
        with pytest.raises(Interrupted):
            training.train(folder, spoiler(training, stop_at))
        again, _ = go_on(teacher_file, folder)
        again.train(folder, spoiler(again))
        return again, folder

    def spoiler(training: Training, stop_at: int | None = None) -> Callable[[Reading], None]:
        def spoil(reading: Reading) -> None:
            if reading.step in (2, 5):
                with torch.no_grad():
                    training.run.state.student.parameters[0].fill_(float("nan"))
            if reading.step == stop_at:
                signal.raise_signal(signal.SIGINT)

        return spoil

    whole, whole_folder = play(tmp_path / "whole", None)
    # Interrupted after the first rollback, and before the second, which goes back to a state from before.
    halves, folder = play(tmp_path / "halves", 5)
    assert_same_state(halves.run.state.state_dict(), whole.run.state.state_dict())
    assert losses(folder) == losses(whole_folder)
    assert sum("taken back" in line["note"] for line in folder.read_metrics()) == 2


def test_what_was_computed_after_the_last_checkpoint_is_computed_again(teacher_file: Path, tmp_path: Path) -> None:
    """A process that is killed leaves metrics that are ahead of its checkpoint, the last line perhaps in part."""
    recipe = miniature("auto", {"log.checkpoint_minutes": 1e-6})
    training, folder = begin(load_teacher(teacher_file), tmp_path / "run", recipe)

    def die_at_five(reading: Reading) -> None:
        if reading.step == 5:
            with folder.metrics.open("a") as stream:
                stream.write('{"step": 6, "stu')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(folder, die_at_five)
    again, plan = go_on(teacher_file, folder)
    assert plan.notes[-1] == "going on from step 4 of 6"
    again.train(folder, lambda _: None)
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert again.run.state.step == STEPS


def test_a_run_that_has_come_to_its_end_only_finishes(teacher: Teacher, teacher_file: Path, tmp_path: Path) -> None:
    training, folder = begin(teacher, tmp_path / "run", miniature())
    training.train(folder, lambda _: None)
    again, _ = go_on(teacher_file, folder)
    before = copy.deepcopy(again.run.state.state_dict())
    again.train(folder, lambda _: None)
    assert_same_state(again.run.state.state_dict(), before)


def test_resume_needs_a_checkpoint(teacher: Teacher, teacher_file: Path, tmp_path: Path) -> None:
    _, folder = begin(teacher, tmp_path / "run", miniature())
    with pytest.raises(DfadcError, match="it holds no checkpoint yet"):
        go_on(teacher_file, folder)


def test_resume_refuses_a_recipe_that_the_checkpoint_does_not_fit(
    teacher: Teacher, teacher_file: Path, tmp_path: Path
) -> None:
    training, folder = begin(teacher, tmp_path / "run", miniature("auto", {"log.checkpoint_minutes": 1e-6}))
    training.train(folder, lambda _: None)
    changed = prepare(
        load_teacher(teacher_file), STUDENT, recipe=miniature("auto", {"generator.latent_dim": 9}), device="cpu"
    )
    with pytest.raises(DfadcError, match="does not fit the run's recipe"):
        changed.resume(folder)


# ------------------------------------------------------------------------------------------------------- the plan


def test_a_plan_says_what_will_be_done(teacher: Teacher) -> None:
    plan = prepare(teacher, STUDENT, recipe=miniature(), device="cpu").__enter__().plan()
    assert plan.images == STEPS * 8 * (2 + plan.recipe.replay.repeats + 1)
    assert plan.seconds == pytest.approx(STEPS * plan.estimate.seconds_per_step)
    assert plan.device == "cpu"
    assert plan.precision.startswith("fp32"), "networks so small gain nothing from bf16"
    assert any("batch-norm layers" in note for note in plan.notes)


def test_a_student_of_the_teachers_family_starts_from_its_weights_and_resumes_at_its_own_rate(
    teacher: Teacher, teacher_file: Path, tmp_path: Path
) -> None:
    training = prepare(teacher, "compact_resnet_4", recipe=miniature(), device="cpu").__enter__()
    # Layers are fitted besides; the statistics are as they were.
    given, own = (
        each.state_dict()["stem.1.running_mean"].tolist() for each in (teacher.module, training.student.module)
    )
    assert set(own) < set(given)
    assert any("starts as compact_resnet_8 made smaller" in note for note in training.notes)
    assert training.recipe.student.optimizer.learning_rate == 0.01
    folder = claim_folder(tmp_path / "run", force=False)
    training.start(folder, training.plan())
    again = prepare(
        load_teacher(teacher_file),
        "compact_resnet_4",
        recipe=load_recipe(folder.recipe),
        device="cpu",
        has_checkpoint=True,
    )
    assert again.recipe == training.recipe


def test_a_student_of_another_family_has_no_hints_and_who_asks_for_them_is_told(teacher: Teacher) -> None:
    with prepare(teacher, "compact_resnet_4", recipe=miniature(), device="cpu") as training:
        assert training.run.student.hints is not None
    with prepare(teacher, "wrn_10_1", recipe=miniature(), device="cpu") as training:
        assert training.run.student.hints is None
        assert training.recipe.student.hints == 0
        assert not any("hints" in note for note in training.notes)
    asked = load_recipe("auto", ["student.hints=2", "steps=4"])
    with pytest.raises(DfadcError, match=r"student\.hints = 2 .* wrn_10_1 is not the teacher made narrower") as caught:
        prepare(teacher, "wrn_10_1", recipe=asked, device="cpu")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_takes_a_student_of_another_family(teacher: Teacher, name: str) -> None:
    """What a recipe says of students of the teacher's family keeps no other from playing."""
    with prepare(teacher, "wrn_10_1", recipe=load_recipe(name), device="cpu") as training:
        assert training.run.student.hints is None


@pytest.fixture
def stock_teacher(tmp_path: Path) -> Teacher:
    """A network of torchvision as it comes, for images that are small for it."""
    torch.manual_seed(0)
    torch.save(torchvision.models.shufflenet_v2_x1_0(num_classes=4).state_dict(), tmp_path / "teacher.pt")
    return load_teacher(tmp_path / "teacher.pt", fields=ContractFields(input_size=(3, 32, 32)))


def test_a_student_of_the_teachers_family_has_its_stem(stock_teacher: Teacher) -> None:
    training = prepare(stock_teacher, "shufflenet_v2_x0_5", recipe=miniature(), device="cpu")
    assert training.student.is_inherited
    assert training.student.stem == "default"
    assert "default stem, as the teacher has" in training.student.notes[-1]
    with training:
        distill(training.run, 1, lambda _: None)


@pytest.mark.parametrize("settings", [{"student.stem": "small"}, {"student.inherit": "off"}])
def test_a_student_with_another_stem_than_the_teachers_starts_from_random_weights(
    stock_teacher: Teacher, settings: dict[str, Any]
) -> None:
    recipe = change_recipe(miniature(), settings)
    training = prepare(stock_teacher, "shufflenet_v2_x0_5", recipe=recipe, device="cpu")
    assert training.student.stem == "small"
    assert not training.student.is_inherited
    assert training.run.student.hints is None
    with training:
        distill(training.run, 1, lambda _: None)


def test_a_student_may_be_asked_to_start_from_random_weights(teacher: Teacher) -> None:
    recipe = miniature("auto", {"student.inherit": "off"})
    training = prepare(teacher, "compact_resnet_4", recipe=recipe, device="cpu")
    assert training.recipe.student.optimizer.learning_rate == recipe.student.optimizer.learning_rate
    assert not any("made smaller" in note for note in training.notes)


@pytest.mark.parametrize("stem", ["small", "default"])
def test_of_a_budget_that_is_too_small_it_is_said_what_may_help(teacher: Teacher, stem: str) -> None:
    """The default stem is no help to a student that has it."""
    recipe = miniature("dfad", {"student.stem": stem})
    plan = (
        prepare(teacher, "torchvision:shufflenet_v2_x0_5", recipe=recipe, device="cpu").__enter__().plan(minutes=0.02)
    )
    (note,) = [note for note in plan.notes if "a student needs hundreds" in note]
    assert "take more minutes or a smaller student" in note
    assert ("student.stem=default" in note) == (stem == "small")


def test_a_time_budget_becomes_the_steps_of_the_run(teacher: Teacher, tmp_path: Path) -> None:
    training = prepare(teacher, STUDENT, recipe=miniature(), device="cpu").__enter__()
    plan = training.plan(minutes=0.02)
    assert plan.recipe.steps == max(1, int(1.2 / plan.estimate.seconds_per_step))
    assert plan.recipe == training.recipe == training.run.recipe
    assert any(f"0.02 minutes are {plan.recipe.steps} steps here" in note for note in plan.notes)
    assert not any("minutes are" in note for note in training.plan().notes)
    folder = claim_folder(tmp_path / "run", force=False)
    training.start(folder, plan)
    assert load_recipe(folder.recipe) == plan.recipe


def test_a_warm_up_is_in_the_plan_and_a_budget_too_small_for_it_is_refused(teacher: Teacher) -> None:
    alone = {"replay.share": 1.0, "replay.procedural_share": 0.0, "replay.repeats": 0}
    pool = {**alone, "student.start": 0.5, "generator.latents": "noisy"}
    plan = prepare(teacher, STUDENT, recipe=miniature("auto", pool), device="cpu").__enter__().plan()
    assert plan.notes[-1].startswith("warm-up: the first 3 of 6 steps")
    assert plan.images == 8 * (3 * 2 + 6 * 1)
    with pytest.raises(DfadcError, match="budget of 1 steps is too small for the warm-up") as caught:
        prepare(teacher, STUDENT, recipe=miniature("auto", pool), device="cpu").__enter__().plan(minutes=1e-9)
    assert caught.value.exit_code == 2
    assert "--minutes" in caught.value.hint


@pytest.mark.parametrize("factor", [0.0, 1e8])
def test_a_teacher_that_cannot_teach_is_refused_before_the_first_step(
    factor: float, teacher: Teacher, tmp_path: Path
) -> None:
    network = copy.deepcopy(teacher.module)
    with torch.no_grad():
        # Without weights only the biases of the last layer are left, the same for every image.
        list(network.parameters())[-2].mul_(factor)
    path = tmp_path / "teacher.safetensors"
    save_network(path, network, architecture="compact_resnet_8", stem="default", contract=CONTRACT)
    with pytest.raises(DfadcError, match="wild scale" if factor else "same logits"):
        prepare(load_teacher(path), STUDENT, recipe=miniature(), device="cpu")


def test_a_plan_computes_nothing_that_lasts(teacher: Teacher) -> None:
    planned, plain = (prepare(teacher, STUDENT, recipe=miniature(), device="cpu").__enter__() for _ in range(2))
    planned.plan()
    assert_same_state(planned.run.state.state_dict(), plain.run.state.state_dict())


def test_a_student_that_is_not_smaller_is_noted(teacher: Teacher) -> None:
    large = prepare(teacher, "compact_resnet_16", recipe=miniature(), device="cpu")
    for problem in ("is not smaller than the teacher", "computes no less than the teacher"):
        assert any(problem in note for note in large.notes)
    small = prepare(teacher, "compact_resnet_4", recipe=miniature(), device="cpu")
    assert not any("is not smaller" in note or "computes no less" in note for note in small.notes)


class DenseNetwork(nn.Conv2d):
    """A class for every pixel."""

    def __init__(self, contract: ImageContract) -> None:
        super().__init__(contract.channels, 5, 3, padding=1)


def test_the_students_dense_logits_are_brought_to_the_teachers_size(tmp_path: Path) -> None:
    name, fields = f"{__name__}:DenseNetwork", ContractFields(input_size=(1, 8, 8), num_classes=5)
    torch.save(DenseNetwork(CONTRACT).state_dict(), tmp_path / "teacher.pt")
    dense = load_teacher(tmp_path / "teacher.pt", architecture=name, fields=fields)
    assert dense.contract.task == "segmentation"
    alike = prepare(dense, name, recipe=miniature(), device="cpu")
    assert not any("resized" in note for note in alike.notes)
    smaller = prepare(dense, "compact_unet_8", recipe=miniature(), device="cpu")
    assert any("logits are 4x4, the teacher's 8x8" in note for note in smaller.notes)
    assert smaller.run.state.student.module(torch.zeros(2, 1, 8, 8)).shape == (2, 5, 8, 8)
    with pytest.raises(DfadcError, match="the teacher predicts every pixel"):
        prepare(dense, "compact_resnet_8", recipe=miniature(), device="cpu")


def test_the_seed_decides_the_start(teacher: Teacher) -> None:
    def start(seed: int) -> dict[str, Any]:
        torch.rand(3)
        return prepare(teacher, STUDENT, recipe=miniature("auto", {"seed": seed}), device="cpu").run.state.state_dict()

    assert_same_state(start(1), start(1))
    with pytest.raises(AssertionError):
        assert_same_state(start(1), start(2))


# ------------------------------------------------------------------------------------------------------ the record


def test_the_record_says_what_the_run_is(teacher: Teacher, tmp_path: Path) -> None:
    training, folder = begin(teacher, tmp_path / "run", miniature("auto", {"seed": 3}))
    record = folder.record()
    assert (record["status"], record["seed"], record["device"]) == ("running", 3, "cpu")
    assert record["teacher"]["sha256"] == teacher.sha256
    assert record["teacher"]["architecture"] == "compact_resnet_8"
    assert record["student"]["architecture"] == STUDENT
    assert record["student"]["num_parameters"] == training.student.num_parameters
    assert folder.contract() == CONTRACT
    assert load_recipe(folder.recipe) == training.recipe


def test_a_run_leaves_teacher_and_signal_handlers_as_it_found_them(teacher: Teacher, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    weights = copy.deepcopy(teacher.module.state_dict())
    training, folder = begin(teacher, tmp_path / "run", miniature())
    training.train(folder, lambda _: None)
    training.__exit__()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_state(teacher.module.state_dict(), weights)
    assert not any(module._forward_pre_hooks for module in teacher.module.modules())  # noqa: SLF001 -- torch's place


def test_readings_are_the_lines_of_the_metrics(teacher: Teacher, tmp_path: Path) -> None:
    training, folder = begin(teacher, tmp_path / "run", miniature("auto", {"log.interval": 4}))
    readings: list[Reading] = []
    training.train(folder, readings.append)
    # At every interval, and at the end whatever the interval is.
    assert [reading.step for reading in readings] == [4, 6]
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [4, 6]
    last = readings[-1]
    assert last.steps == STEPS
    assert last.seconds_left == 0
    assert last.images_per_second > 0
    assert 0 <= last.class_entropy <= 1
    assert 0 <= last.agreement <= 1
    assert set(last.terms) == {"discrepancy", "batch_norm", "one_hot", "balance"}
    assert last.note == ""


def test_a_network_that_is_taken_back_is_noted(teacher: Teacher, tmp_path: Path) -> None:
    training, folder = begin(teacher, tmp_path / "run", miniature())
    readings: list[Reading] = []

    def spoil(reading: Reading) -> None:
        readings.append(reading)
        if reading.step == 2:
            with torch.no_grad():
                training.run.state.student.parameters[0].fill_(float("nan"))

    training.train(folder, spoil)
    assert ["taken back" in reading.note for reading in readings] == [False, False, True, False, False, False]
    rates = [reading.student_rate for reading in readings]
    assert rates[3] < 0.6 * rates[1]
    assert all(value.isfinite().all() for value in training.run.state.student.average.state_dict().values())


# ---------------------------------------------------------------------------------------------------- the samples


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 5000), samples=st.integers(1, 5000))
def test_snapshot_samples_are_drawn_evenly_over_the_run(steps: int, samples: int) -> None:
    recipe = load_recipe("auto", [f"verify.num_samples={samples}"])
    chosen = sorted(snapshot_steps(steps))
    assert len(chosen) <= NUM_SNAPSHOTS
    assert all(1 <= step <= steps for step in chosen)
    if steps > 2 * (NUM_SNAPSHOTS + 1):
        assert len(chosen) == NUM_SNAPSHOTS
        assert chosen[-1] < steps
        gaps = [after - before for before, after in zip([0, *chosen], [*chosen, steps], strict=True)]
        assert max(gaps) - min(gaps) <= 1
    count = max(1, samples // 6)
    assert count <= NUM_SNAPSHOTS * snapshot_size(recipe, CONTRACT) < count + NUM_SNAPSHOTS


def test_setting_samples_aside_changes_nothing_that_is_trained(teacher: Teacher) -> None:
    """They come from a stream of latents that training never draws from."""
    disturbed, plain = (prepare(teacher, STUDENT, recipe=miniature(), device="cpu").__enter__().run for _ in range(2))
    for run in (disturbed, plain):
        torch.manual_seed(0)
        distill(run, 1, lambda _: None)
        if run is disturbed:
            draw_snapshot_samples(run, 5)
        distill(run, 3, lambda _: None)
    one, other = disturbed.state.state_dict(), plain.state.state_dict()
    assert one.pop("snapshots").shape == (5, 1, 8, 8)
    assert len(other.pop("snapshots")) == 0
    assert not torch.equal(one.pop("sample_rng"), other.pop("sample_rng"))
    assert_same_state(one, other)


def test_a_run_sets_aside_what_the_snapshots_have_of_its_samples(teacher: Teacher, tmp_path: Path) -> None:
    training, folder = begin(teacher, tmp_path / "run", miniature())
    training.train(folder, lambda _: None)
    assert len(training.run.state.snapshots) == 5  # of 32 samples a sixth, one at a time
