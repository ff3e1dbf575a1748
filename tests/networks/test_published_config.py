"""Preprocessing that is published with weights: by their library, or in a JSON file beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torchvision.models import get_model, mobilenet_v3_small

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError
from dfadc.evaluation.image_files import read_image
from dfadc.networks.names import documented_contract
from dfadc.networks.published_config import read_published_configs
from dfadc.preprocessing import Preprocessing
from dfadc.teacher.load import load_teacher

if TYPE_CHECKING:
    from pathlib import Path

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision:resnet18", Preprocessing(crop_share=224 / 256)),
        ("torchvision:efficientnet_b1", Preprocessing(crop_share=240 / 255)),
        ("torchvision:swin_t", Preprocessing(crop_share=224 / 232, interpolation="bicubic")),
        ("timm:vit_base_patch16_224", Preprocessing(crop_share=0.9, interpolation="bicubic")),
        ("timm:tf_efficientnetv2_s.in21k_ft_in1k", Preprocessing(crop_share=1.0, interpolation="bicubic")),
        ("timm:convnext_tiny.in12k_ft_in1k_384", Preprocessing("squash", 1.0, "bicubic")),
        ("compact_resnet_20", None),
    ],
)
def test_the_library_documents_it(name: str, expected: Preprocessing | None) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    assert documented_contract(name).preprocessing == expected


@pytest.mark.parametrize("name", ["resnet50", "vit_base_patch16_224", "mobilenetv2_050", "beit_base_patch16_384"])
def test_pixels_are_timms(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    contract = replace(documented_contract(f"timm:{name}"), task="classification").complete()
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**{**config, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    for index, pixels in enumerate(load_sample_images().images):
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).save(path)
        expected = transform(Image.fromarray(pixels)).mul(255).round().to(torch.uint8).numpy()
        np.testing.assert_array_equal(read_image(path, contract), expected)


def test_a_teacher_keeps_its_librarys_preprocessing_or_the_sidecars(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(get_model("squeezenet1_1", weights=None).state_dict(), path)
    flags = ContractFields(input_size=(3, 64, 64))
    teacher = load_teacher(path, architecture="torchvision:squeezenet1_1", fields=flags)
    assert teacher.contract.preprocessing == Preprocessing(crop_share=224 / 256)
    assert teacher.contract.preprocessing.describe((64, 64)) == "shorter side to 73 px (bilinear), centre 64x64"
    assert teacher.contract_sources["preprocessing"].startswith("torchvision weights of squeezenet1_1")
    sidecar = tmp_path / "teacher.toml"
    sidecar.write_text('[preprocessing]\nresize = "squash"\ninterpolation = "bicubic"\n')
    beside = load_teacher(path, architecture="torchvision:squeezenet1_1", fields=flags)
    assert beside.contract.preprocessing == Preprocessing("squash", 1.0, "bicubic")
    assert beside.contract == teacher.contract  # The network takes the same images: a run goes on with either.
    sidecar.write_text('[preprocessing]\nresize = "stretch"\n')
    with pytest.raises(DfadcError, match=r"teacher\.toml: preprocessing has resize 'stretch'"):
        load_teacher(path, architecture="torchvision:squeezenet1_1", fields=flags)


def test_weights_of_other_classes_have_an_unknown_preprocessing(tmp_path: Path) -> None:
    save_file(mobilenet_v3_small(num_classes=5).state_dict(), tmp_path / "weights.safetensors")
    flags = ContractFields(input_size=(3, 64, 64))
    assert load_teacher(tmp_path / "weights.safetensors", fields=flags).contract.preprocessing is None


def test_timms_config_beside_published_weights(tmp_path: Path) -> None:
    config = {
        "architecture": "mobilenetv3_small_100",
        "num_classes": 5,
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    save_file(mobilenet_v3_small(num_classes=5).state_dict(), path)
    teacher = load_teacher(path)
    assert teacher.contract.input_size == (3, 64, 64)
    assert teacher.contract.mean == (0.1, 0.2, 0.3)
    assert teacher.contract.preprocessing == Preprocessing(crop_share=0.9, interpolation="bicubic")
    assert teacher.contract_sources["preprocessing"] == "config.json"
    assert read_published_configs(path.rename(tmp_path / "another.safetensors")) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (  # ViT
            {"do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2, **HALF},
            {"input_size": (3, 224, 224), "preprocessing": Preprocessing("squash")},
        ),
        (  # ViT, in the words of earlier versions
            {"do_resize": True, "size": 224, "resample": 2, **HALF},
            {"input_size": (3, 224, 224), "preprocessing": Preprocessing("squash")},
        ),
        (  # ResNet and ConvNeXt
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3, **HALF},
            {"input_size": (3, 224, 224), "preprocessing": Preprocessing("cover", 224 / 256, "bicubic")},
        ),
        (  # ConvNeXt at 384
            {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3, **HALF},
            {"input_size": (3, 384, 384), "preprocessing": Preprocessing("squash", 1.0, "bicubic")},
        ),
        (  # DeiT
            {"size": 256, "do_center_crop": True, "crop_size": 224, "resample": 3, **HALF},
            {"input_size": (3, 224, 224), "preprocessing": Preprocessing("cover", 224 / 256, "bicubic")},
        ),
        (  # MobileViT: pixels as they are, in BGR
            {
                "size": {"shortest_edge": 288},
                "do_center_crop": True,
                "crop_size": {"height": 256, "width": 256},
                "do_flip_channel_order": True,
                "resample": 2,
                "do_normalize": False,
                "do_rescale": True,
            },
            {
                "input_size": (3, 256, 256),
                "mean": (0.0, 0.0, 0.0),
                "std": (1.0, 1.0, 1.0),
                "preprocessing": Preprocessing("cover", 256 / 288, "bilinear", "BGR"),
            },
        ),
        ({"size": {"shortest_edge": 480}, "resample": 2, **HALF}, {}),
        ({"do_resize": False, **HALF}, {}),
        ({"size": 224, **HALF}, {"input_size": (3, 224, 224)}),
    ],
)
def test_image_processors_of_hugging_face(config: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    ((name, fields),) = read_published_configs(tmp_path / "model.safetensors")
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert name == "preprocessor_config.json"
    assert fields == ContractFields(**{**half, **expected})
    assert fields.preprocessing == expected.get("preprocessing")


def test_values_from_0_to_255_become_mean_and_std_of_pixels_in_0_to_1(tmp_path: Path) -> None:
    config = {"image_mean": [51.0, 102.0, 127.5], "image_std": [255.0, 51.0, 1.0], "do_rescale": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    ((_, fields),) = read_published_configs(tmp_path / "pytorch_model.bin")
    assert fields.mean == pytest.approx((0.2, 0.4, 0.5))
    assert fields.std == pytest.approx((1.0, 0.2, 1 / 255))


@pytest.mark.parametrize("text", ["[1]", "{}", '{"architectures": ["BertModel"]}', '{"pretrained_cfg": null}'])
def test_a_config_of_something_else_says_nothing(text: str, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(text)
    assert read_published_configs(tmp_path / "model.safetensors") == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"pretrained_cfg": [1]}'),
        ("config.json", '{"pretrained_cfg": {"crop_pct": "much"}}'),
        ("preprocessor_config.json", '{"size": {"height": 224}}'),
        ("preprocessor_config.json", '{"size": 224, "resample": 9}'),
        ("preprocessor_config.json", '{"image_mean": ["a"], "image_std": [1]}'),
        ("preprocessor_config.json", '{"size": {"height": 0, "width": 0}, "resample": 2}'),
        ("preprocessor_config.json", '{"image_mean": [1], "image_std": [1], "rescale_factor": 0}'),
    ],
)
def test_a_malformed_config_is_named(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DfadcError, match=name):
        read_published_configs(tmp_path / "model.safetensors")


def test_a_contract_of_before_has_no_preprocessing_and_is_equal() -> None:
    contract = ImageContract((3, 8, 8), 2, preprocessing=Preprocessing(crop_share=0.5))
    values = contract.to_dict()
    assert ImageContract.from_dict(json.loads(json.dumps(values))).preprocessing == contract.preprocessing
    del values["preprocessing"]
    before = ImageContract.from_dict(values)
    assert before.preprocessing is None
    assert before == contract


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("squash", "not a table"),
        ({"crop": 0.5}, "unknown preprocessing field 'crop'"),
        ({"crop_share": 0}, "crop_share 0.0, not above 0"),
        ({"crop_share": float("nan")}, "crop_share nan"),
        ({"crop_share": "much"}, "malformed contract"),
        ({"interpolation": "random"}, "interpolation 'random'"),
        ({"channel_order": "bgr"}, "channel_order 'bgr'"),
        ({"resize": ["cover"]}, r"resize \['cover'\]"),
    ],
)
def test_malformed_preprocessing_is_refused(values: object, message: str) -> None:
    with pytest.raises(DfadcError, match=message):
        ContractFields.from_dict({"preprocessing": values})
