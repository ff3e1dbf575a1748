"""The beginning of a run with smaller images: who draws them, who sees them, and who cannot."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from miniature import build_game
from states import assert_same_state
from torch.utils.flop_counter import FlopCounterMode

from dfadc.contract import ImageContract
from dfadc.distillation.generator.networks import build_generator, scaled_size
from dfadc.distillation.loop import distill
from dfadc.errors import DfadcError
from dfadc.networks.flops import count_parameters
from dfadc.networks.network_file import save_network
from dfadc.networks.zoo import NETWORKS, SEGMENTERS
from dfadc.recipe.load import load_recipe
from dfadc.recipe.schema import GeneratorSettings
from dfadc.teacher.load import load_teacher
from dfadc.training.cost import time_steps
from dfadc.training.run import prepare

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.distillation.objectives import Game

HALF = ("steps=4", "generator.low_resolution=0.5")


def sides_seen(game: Game, steps: int) -> list[int]:
    """Sides of the images that the teacher saw, one for each step's last question."""
    sides: list[int] = []
    handle = game.teacher.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    last = []
    for step in range(game.players.step + 1, steps + 1):
        distill(game, step, lambda _: None)
        last.append(sides[-1])
        assert len(set(sides)) == 1
        sides.clear()
    handle.remove()
    return last


@pytest.mark.parametrize("recipe", ["auto", "dfad", "zskt", "dfad+"])
def test_the_first_share_of_the_run_is_played_small(recipe: str) -> None:
    game = build_game(recipe, *HALF)
    assert sides_seen(game, 4) == [4, 4, 8, 8]


def test_only_whole_images_are_remembered() -> None:
    game = build_game("auto", *HALF)
    distill(game, 2, lambda _: None)
    assert len(game.players.ring) == len(game.players.reservoir) == 0
    distill(game, 3, lambda _: None)
    assert len(game.players.ring) > 0
    assert game.players.ring.images.shape[1:] == (1, 8, 8)


def test_a_run_that_is_interrupted_while_small_goes_on_bit_by_bit() -> None:
    whole, again = build_game("auto", *HALF), build_game("auto", *HALF)
    distill(whole, 1, lambda _: None)
    state = copy.deepcopy(whole.players.state_dict())
    distill(whole, 4, lambda _: None)
    again.players.load_state_dict(state)
    distill(again, 4, lambda _: None)
    assert_same_state(again.players.state_dict(), whole.players.state_dict())


@pytest.mark.parametrize("architecture", ["scalable", "paper_a", "paper_b"])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 20), (64, 48)])
@pytest.mark.parametrize("scale", [0.5, 0.7])
def test_every_generator_draws_smaller_images(architecture: str, size: tuple[int, int], scale: float) -> None:
    contract = ImageContract((3, *size), 10, mean=(0.5,) * 3, std=(0.5,) * 3)
    settings = GeneratorSettings.model_validate({"architecture": architecture, "latent_dim": 16, "output": "pixels"})
    generator = build_generator(settings, contract)
    latents = torch.randn(3, 16)
    images = generator(latents, scale)
    assert images.shape == (3, 3, round(size[0] * scale), round(size[1] * scale))
    assert torch.autograd.grad(images.square().mean(), generator.body[0].linear.weight)[0].abs().sum() > 0  # type: ignore[index, union-attr]
    assert torch.equal(generator.eval()(latents, 1.0), generator(latents))


def test_small_images_are_a_share_of_the_arithmetic_and_of_the_estimate() -> None:
    settings = GeneratorSettings(architecture="paper_a", latent_dim=16)
    generator = build_generator(settings, ImageContract((3, 64, 64), 10))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generator(torch.randn(4, 16))
        whole = counter.get_total_flops()
        generator(torch.randn(4, 16), 0.5)
        assert counter.get_total_flops() - whole == pytest.approx(whole / 4, rel=0.1)
    contract = ImageContract((1, 64, 64), 10, mean=(0.5,), std=(0.5,))
    rules = ("batch_size=16", "student.steps=3", "steps=10")
    small, large = (
        time_steps(build_game("dfad", *rules, f"generator.low_resolution={share}", contract=contract))
        for share in (0.9, 0.0)
    )
    assert small < 0.7 * large


def test_a_generator_at_224_px_has_at_most_8_million_parameters() -> None:
    contract = ImageContract((3, 224, 224), 1000)
    generator = build_generator(GeneratorSettings(architecture="scalable", latent_dim=256), contract)
    assert 1e6 < count_parameters(generator) < 8e6
    assert generator(torch.randn(2, 256)).shape == (2, 3, 224, 224)
    assert scaled_size((224, 224), 0.5) == (112, 112)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("replay.share=1", "student.start=0.1", "generator.low_resolution=0.1"), "the ring holds images of the input"),
        (
            (
                *("generator.architecture=free_pixels", "generator.latents=optimised", "generator.latent_dim=0"),
                *("replay.share=1", "student.start=0.1", "generator.low_resolution=0.1"),
            ),
            "free_pixels have no layers that take any size",
        ),
        (("steps=10", "generator.low_resolution=0.95"), "none would be played with whole images"),
    ],
)
def test_what_cannot_be_played_small_is_refused(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(DfadcError, match=problem) as caught:
        build_game("auto", *overrides)
    assert "generator.low_resolution=0" in caught.value.hint


def teacher_file(folder: Path, architecture: str) -> Path:
    contract = ImageContract((1, 32, 32), 10, mean=(0.5,), std=(0.5,))
    torch.manual_seed(0)
    module = NETWORKS[architecture](contract)
    path = folder / f"{architecture}.safetensors"
    save_network(path, module.eval(), architecture=architecture, stem="default", contract=contract)
    return path


@pytest.mark.parametrize(
    ("teacher", "student", "role"),
    [("lenet5", "compact_resnet_16", "teacher"), ("compact_resnet_16", "lenet5", "student")],
)
def test_a_network_of_one_size_is_refused_with_the_reason(
    teacher: str, student: str, role: str, tmp_path: Path
) -> None:
    recipe = load_recipe("dfad", ["generator.low_resolution=0.2", "batch_size=4"])
    loaded = load_teacher(teacher_file(tmp_path, teacher))
    with pytest.raises(DfadcError, match=f"the {role} lenet5 does not take images of 16x16: ") as caught:
        prepare(loaded, student, recipe=recipe, device="cpu")
    assert caught.value.hint == "--set generator.low_resolution=0"


def test_networks_of_any_size_are_taken_and_left_as_they_were(tmp_path: Path) -> None:
    recipe = load_recipe("dfad", ["generator.low_resolution=0.2", "batch_size=4"])
    loaded = load_teacher(teacher_file(tmp_path, "compact_resnet_16"))
    plain = load_recipe("dfad", ["batch_size=4"])
    with (
        prepare(loaded, "compact_resnet_16", recipe=recipe, device="cpu") as small,
        prepare(loaded, "compact_resnet_16", recipe=plain, device="cpu") as whole,
    ):
        assert small.student.module.training
        assert not loaded.module.training
        assert_same_state(small.student.module.state_dict(), whole.student.module.state_dict())


def test_a_student_whose_logits_are_resized_to_one_size_is_refused(tmp_path: Path) -> None:
    contract = ImageContract((3, 32, 32), 4, mean=(0.5,) * 3, std=(0.5,) * 3, task="segmentation")
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    teacher = SEGMENTERS["compact_unet_8"](contract).eval()
    save_network(path, teacher, architecture="compact_unet_8", stem="default", contract=contract)
    recipe = load_recipe("dfad-seg", ["generator.low_resolution=0.2", "batch_size=4"])
    with pytest.raises(DfadcError, match="to images of 16x16 teacher and student give logits of shape"):
        prepare(load_teacher(path), "deeplabv3_mobilenetv2", recipe=recipe, device="cpu")
