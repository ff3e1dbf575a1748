"""Descriptions of files that are no teachers, each with the way to one; and the file of weights in a folder."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from dfadc.networks.published_config import PUBLISHED_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_TEACHER = "a teacher is a .safetensors file or a checkpoint of torch.save"
_AGAIN = "copy or download it again"
_PADDLE = "export the network with paddle2onnx, or convert its arrays to a torch state dict"
_SAVE_WEIGHTS = "load it where it was written and save its weights: torch.save(network.state_dict(), 'teacher.pt')"
_SAVED_MODEL = "convert it with tf2onnx, or give PyTorch weights"
_TORCH7 = "convert it to a PyTorch state dict, e.g. with the package torchfile"
_BEGINNINGS: tuple[tuple[re.Pattern[bytes], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), description, remedy)
    for pattern, description, remedy in (
        (rb"\s*(<!doctype|<html|<\?xml)", "an HTML page (a download that failed?)", _AGAIN),
        (rb"\s*version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)", "run `git lfs pull` beside it"),
        (rb"\x80.{0,40}(joblib|sklearn)", "a pickle of joblib or scikit-learn", "give a neural network of PyTorch"),
        (rb"\x80.{0,200}StructuredToParameterName@@", "a PaddlePaddle checkpoint", _PADDLE),
        (rb"\x80", "a plain Python pickle, which only running it could open", _SAVE_WEIGHTS),
        (rb"....TFL3", "a TensorFlow Lite model", "give the network that it was converted from"),
        (rb"[\x01-\x04]\0\0\0.{4}[\x01-\x04]\0\0\0V \d", "a Torch7 file (.t7, Lua)", _TORCH7),
        (rb"\x08\x01\x12.{0,2}\x0a", "a TensorFlow SavedModel", _SAVED_MODEL),
        (
            rb"[a-z]trt",
            "a TensorRT engine for one GPU, without gradients",
            "give the PyTorch weights it was built from",
        ),
        (rb"\x93NUMPY", "a NumPy array", "save named weights: torch.save({name: tensor}, 'teacher.pt')"),
        (rb"\x1f\x8b", "a gzip archive", "unpack it and name the file inside"),
        (rb".{257}ustar", "a tar archive", "unpack it and name the file inside"),
        (rb"GGUF", "a GGUF file of a language model", _TEACHER),
        (rb"\s*[{\[]", "JSON text", _TEACHER),
    )
)
_WEIGHTS = (*PUBLISHED_WEIGHTS, "mp_rank_00_model_states.pt")
_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar")
_BESIDE = ("optimizer", "scheduler", "training_args", "random_states", "rng_state", "scaler", "sampler")


def describe_unknown(path: Path) -> tuple[str, str]:
    """A guess at the kind of a file that is none of ours, and a remedy, for the error message."""
    with path.open("rb") as stream:
        head = stream.read(512)
    for pattern, description, remedy in _BEGINNINGS:
        if pattern.match(head):
            return description, remedy
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "a text file", _TEACHER
    return f"of no known kind (it starts with {head[:8].hex(' ')})", _TEACHER


def describe_archive(names: Sequence[str]) -> tuple[str, str]:
    """The same for a zip archive with members of these names."""
    if names and all(name.endswith(".npy") for name in names):
        return (
            "an archive of NumPy arrays (.npz), not a PyTorch file",
            "save them as tensors: torch.save({name: torch.from_numpy(array)}, 'teacher.pt')",
        )
    if any("paddle" in name for name in names):
        return "an archive of PaddlePaddle", _PADDLE
    return "a zip archive, but no PyTorch file", "unpack it and name the file inside"


def weights_in_folder(folder: Path) -> Path:
    """The one file of weights in a folder that a training framework wrote (accelerate, DeepSpeed, transformers).

    Raises:
        DfadcError: there is none, or several.
    """
    latest = folder / "latest"
    if latest.is_file() and latest.stat().st_size < 200:
        # DeepSpeed names the newest of its subfolders there.
        inner = folder / latest.read_text(encoding="utf-8", errors="replace").strip()
        if inner.parent == folder and inner.is_dir():
            return weights_in_folder(inner)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if list(folder.glob("*.distcp")):
        raise DfadcError(
            f"{folder} is a distributed checkpoint in parts",
            "join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER teacher.pt",
        )
    if (folder / "saved_model.pb").is_file():
        raise DfadcError(f"{folder} is a TensorFlow SavedModel", _SAVED_MODEL)
    found = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and not path.name.startswith(_BESIDE))
    if len(found) == 1:
        return found[0]
    described = f"it holds {', '.join(path.name for path in found[:5])}" if found else "it holds no file of weights"
    raise DfadcError(f"{folder} is a folder, not a teacher file ({described})", "name the file in it")
