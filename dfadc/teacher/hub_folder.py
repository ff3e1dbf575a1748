"""Reader of published folders: Hugging Face's (``model_type`` in config.json) and timm's (``architecture`` in it).

Size, mean, std, resize and class names are read from the same folder by :mod:`dfadc.networks.published_config`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError
from dfadc.networks.construct import import_extra
from dfadc.networks.published_config import PUBLISHED_WEIGHTS
from dfadc.networks.user_code import running_user_code
from dfadc.teacher.file_kind import sniff_kind
from dfadc.teacher.teacher_file import TeacherFile
from dfadc.teacher.training_arguments import TrainingArguments

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "config.json"
#: End of the name of a transformers class -> the class that loads it.
_LOADERS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForImageClassificationWithTeacher": "AutoModelForImageClassification",
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
}
#: End of the name of another class -> its description.
_OTHERS = {
    "ForObjectDetection": "an object detector",
    "ForUniversalSegmentation": "a network of panoptic segmentation",
    "ForInstanceSegmentation": "a network of instance segmentation",
    "ForDepthEstimation": "a network of depth estimation",
    "ForMaskedImageModeling": "a network for pre-training, without classifier",
    "ForPreTraining": "a network for pre-training, without classifier",
    "ForSequenceClassification": "a text classifier",
    "ForTokenClassification": "a text classifier",
    "ForQuestionAnswering": "a text network",
    "ForMaskedLM": "a language model",
    "ForCausalLM": "a language model",
    "ForConditionalGeneration": "a generative model",
    "ForAudioClassification": "an audio classifier",
    "ForVideoClassification": "a video classifier",
}


def read_hub_config(weights: Path) -> Mapping[str, Any] | None:
    """The configuration beside published weights that names their network; None where there is none."""
    path = weights.parent / CONFIG
    if weights.name not in PUBLISHED_WEIGHTS or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise DfadcError(
            f"cannot read {path}: {exc}", "copy it again, or name the network with --teacher-arch"
        ) from exc
    names_network = isinstance(config, dict) and ("model_type" in config or isinstance(config.get("architecture"), str))
    return config if names_network else None


def describe_timm(contents: TeacherFile, config: Mapping[str, Any]) -> TeacherFile:
    """Weights of a timm folder with the architecture that its configuration names."""
    arguments = config.get("model_args") or {}
    left = ("num_classes", "in_chans", "global_pool", "pretrained")
    given = ",".join(f"{name}={value}" for name, value in arguments.items() if name not in left)
    name = f"{config['architecture']}({given})" if given else str(config["architecture"])
    return replace(contents, arguments=TrainingArguments(f"architecture in {CONFIG}", {"model": name}, is_timm=True))


def read_transformers(weights: Path, config: Mapping[str, Any], *, trust: bool) -> TeacherFile:
    """Reads a Hugging Face folder with the transformers library, offline.

    Args:
        weights: the file of weights, or the index of its shards.
        config: the configuration beside it.
        trust: whether code in the folder may run (``--trust-teacher``).

    Raises:
        RequirementMissing: transformers is not installed.
        DfadcError: it is no classifier of images or pixels, needs code and is not trusted, or lacks weights.
    """
    folder = weights.parent
    name = str(next(iter(config.get("architectures") or ()), ""))
    loader = next((loader for ending, loader in _LOADERS.items() if name.endswith(ending)), None)
    if loader is None:
        described = next((words for ending, words in _OTHERS.items() if name.endswith(ending)), "no such network")
        shown = f"{name} ({described})" if name else f"a {config['model_type']} without architecture in {CONFIG}"
        raise DfadcError(
            f"{folder} holds {shown}; a teacher classifies images or their pixels",
            "give a folder whose class ends in ForImageClassification or ForSemanticSegmentation",
        )
    if config.get("quantization_config"):
        raise DfadcError(f"{folder} holds quantised weights, which give no gradient", "give the float weights")
    transformers = import_extra(
        "transformers", "hf", f"{folder} is a Hugging Face folder, and transformers, which loads it, is not installed"
    )
    transformers.utils.logging.disable_progress_bar()
    remedy = "copy the folder again"
    if "auto_map" in config and not trust:
        remedy = f"its {CONFIG} names code in the folder: if you trust it, pass --trust-teacher"
    with running_user_code(f"transformers cannot load {folder}", remedy):
        module, info = getattr(transformers, loader).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise DfadcError(
            f"{folder} lacks {len(missing)} weights of {name}, which would be random: {', '.join(missing[:3])}",
            "give the folder of the trained network, its classifier included",
        )
    module.original_name = f"transformers:{type(module).__name__}"
    note = f"{type(module).__name__} of transformers {transformers.__version__}, as {CONFIG} says"
    head = "Sigmoid" if config.get("problem_type") == "multi_label_classification" else ""
    return TeacherFile(weights, sniff_kind(weights), module=module, notes=(note,), cut_head=head)
