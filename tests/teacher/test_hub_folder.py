"""Published folders of Hugging Face and timm, made by the libraries themselves."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError, RequirementMissing
from dfadc.teacher.file_kind import FileKind
from dfadc.teacher.load import Teacher, inspect_teacher, load_teacher

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("cat", "dog", "fox", "owl")


def save_transformers(folder: Path, kind: str = "ForImageClassification", **saving: Any) -> Any:
    """A small ResNet of transformers with an image processor; returns the network."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    network = getattr(transformers, f"ResNet{kind}")(config).eval()
    network.save_pretrained(folder, **saving)
    processor = {
        "do_resize": True,
        "size": {"shortest_edge": 40},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.2, 0.2],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return network


def assert_is_resnet(teacher: Teacher, network: Any) -> None:
    assert teacher.architecture == "transformers:ResNetForImageClassification (whole module)"
    assert teacher.contract.class_names == NAMES
    assert teacher.contract.input_size == (3, 32, 32)
    assert (teacher.contract.mean, teacher.contract.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    assert teacher.contract.preprocessing is not None
    assert teacher.contract.preprocessing.crop_share == pytest.approx(0.8)
    assert teacher.contract.preprocessing.interpolation == "bicubic"
    assert teacher.batch_norms
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(teacher.logits(images), network(images).logits)


@pytest.mark.parametrize(
    ("saving", "file"),
    [({}, "model.safetensors"), ({"max_shard_size": "10KB"}, "model.safetensors.index.json")],
    ids=["whole", "shards"],
)
def test_hugging_face_folder(saving: dict[str, Any], file: str, tmp_path: Path) -> None:
    network = save_transformers(tmp_path, **saving)
    teacher = load_teacher(tmp_path)
    assert_is_resnet(teacher, network)
    assert teacher.path == tmp_path / file
    # A run remembers the file, and loads the teacher from it again.
    assert_is_resnet(load_teacher(teacher.path), network)


def test_a_folder_of_several_labels_an_image(tmp_path: Path) -> None:
    network = save_transformers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    teacher = load_teacher(tmp_path)
    assert teacher.contract.task == "multilabel"
    assert any("a sigmoid for each of its 4 outputs" in warning for warning in teacher.warnings)
    stated = load_teacher(tmp_path, fields=ContractFields(task="classification"))
    assert stated.contract.task == "classification"
    assert_is_resnet(stated, network)


def test_hugging_face_folder_of_pickled_weights(tmp_path: Path) -> None:
    network = save_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    teacher = load_teacher(tmp_path)
    assert_is_resnet(teacher, network)
    assert teacher.kind is FileKind.CHECKPOINT


def test_inspecting_a_hugging_face_folder(tmp_path: Path) -> None:
    save_transformers(tmp_path)
    report = inspect_teacher(tmp_path)
    assert report.problem is None
    assert report.contract["class_names"] == NAMES
    assert "4 classes" in str(report.outputs)


def test_transformers_alone_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_transformers(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RequirementMissing) as caught:
        load_teacher(tmp_path)
    assert (caught.value.hint, caught.value.exit_code) == ("pip install 'dfadc[hf]'", 4)


def test_weights_without_a_trained_classifier_are_refused(tmp_path: Path) -> None:
    save_transformers(tmp_path, "Model")
    with pytest.raises(DfadcError, match="ResNetModel"):
        load_teacher(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["ResNetForImageClassification"]}))
    with pytest.raises(DfadcError, match=r"lacks \d+ weights of ResNetForImageClassification.*classifier"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "described"),
    [
        ("DetrForObjectDetection", "an object detector"),
        ("BertForSequenceClassification", "a text classifier"),
        ("GPT2ForCausalLM", "a language model"),
        ("ViTForMaskedImageModeling", "pre-training"),
        ("CLIPModel", "no such network"),
    ],
)
def test_other_tasks_are_refused_in_words(architecture: str, described: str, tmp_path: Path) -> None:
    """The class alone decides, so that nothing is built and transformers need not be there."""
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", "architectures": [architecture]}))
    with pytest.raises(DfadcError, match=f"{architecture} .*{described}") as caught:
        load_teacher(tmp_path)
    assert "ForImageClassification" in caught.value.hint


CODE = """
from pathlib import Path
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
Path({marker!r}).touch()
class OwnConfig(PretrainedConfig):
    model_type = "own"
class OwnForImageClassification(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.post_init()
    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.conv(pixel_values).mean((2, 3)))
"""


def test_code_in_the_folder_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, marker = tmp_path / "own", tmp_path / "ran"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "code.OwnConfig", "AutoModelForImageClassification": "code.OwnForImageClassification"}
    config = {"model_type": "own", "architectures": ["OwnForImageClassification"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps({**config, "image_size": 16}))
    convolution = torch.nn.Conv2d(3, 4, 3)
    torch.save({f"conv.{name}": each for name, each in convolution.state_dict().items()}, folder / "pytorch_model.bin")
    with pytest.raises(DfadcError, match="transformers cannot load") as caught:
        load_teacher(folder)
    assert "--trust-teacher" in caught.value.hint
    assert not marker.exists()
    teacher = load_teacher(folder, trust=True)
    assert marker.exists()
    assert teacher.contract.input_size == (3, 16, 16)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(teacher.logits(images), convolution(images).mean((2, 3)))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_timm_folder_is_its_own_architecture(file: str, tmp_path: Path) -> None:
    """Weights of timm's resnet18 fit torchvision's as well; the configuration says whose they are."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=4, pretrained_cfg_overlay={"input_size": (3, 64, 64)}).eval()
    safe = file == "model.safetensors"
    timm.models.save_for_hf(network, tmp_path, model_config={"label_names": NAMES}, safe_serialization=safe)
    assert (tmp_path / file).is_file()
    for path in (tmp_path, tmp_path / file):
        teacher = load_teacher(path)
        assert teacher.architecture == "timm:resnet18"
        assert teacher.contract.input_size == (3, 64, 64)
        assert teacher.contract.class_names == NAMES
        assert teacher.contract.preprocessing is not None
        assert teacher.contract.preprocessing.interpolation == "bicubic"
        images = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(teacher.logits(images), network(images))


class TouchesAFile:
    """Unpickling it runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_pickled_weights_run_no_code(tmp_path: Path) -> None:
    network = save_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    contents = {**network.state_dict(), "payload": TouchesAFile(tmp_path / "ran")}
    torch.save(contents, tmp_path / "pytorch_model.bin")
    with pytest.raises(DfadcError, match="transformers cannot load"):
        load_teacher(tmp_path)
    assert not (tmp_path / "ran").exists()
