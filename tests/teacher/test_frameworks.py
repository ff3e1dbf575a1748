"""Checkpoints as training frameworks write them, byte-faithfully by hand: each teaches at the first try, untrusted."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import types
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.names import build_architecture
from dfadc.teacher.load import Teacher, inspect_teacher, load_teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GREY = ContractFields(input_size=(1, 28, 28))
IMAGES = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A lenet5 in the attribute that Lightning modules have it in, with the loss beside it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(5))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(1)
    return build_architecture("lenet5", ImageContract((1, 28, 28), 5)).module.eval()


@pytest.fixture(autouse=True)
def _foreign_modules() -> Iterator[None]:
    """Classes of frameworks that are there while a file is written and gone while it is read."""
    names = {
        "omegaconf.dictconfig": ["DictConfig"],
        "omegaconf.base": ["ContainerMetadata", "Metadata"],
        "omegaconf.nodes": ["AnyNode"],
        "lightning_fabric.utilities.data": ["AttributeDict"],
        "mmengine.config": ["ConfigDict"],
        "fastai.learner": ["Learner"],
        "yacs.config": ["CfgNode"],
        "ignite.engine": ["State"],
        "skorch.classifier": ["NeuralNetClassifier"],
    }
    for module_name, classes in names.items():
        module = types.ModuleType(module_name)
        for name in classes:
            base = (dict,) if name in ("AttributeDict", "ConfigDict", "CfgNode") else (object,)
            made: type[Any] = type(name, base, {"__module__": module_name})
            setattr(module, name, made)
        sys.modules[module_name] = module
        parts = module_name.split(".")
        for length in range(1, len(parts)):
            package = sys.modules.setdefault(".".join(parts[:length]), types.ModuleType(".".join(parts[:length])))
            package.__path__ = []
    yield
    forget_foreign_modules()


def forget_foreign_modules() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in (
            "omegaconf",
            "lightning_fabric",
            "mmengine",
            "fastai",
            "yacs",
            "ignite",
            "skorch",
        ):
            del sys.modules[name]


def foreign(name: str, attributes: dict[str, Any] | None = None, entries: dict[str, Any] | None = None) -> Any:
    module_name, _, class_name = name.rpartition(".")
    kind = getattr(sys.modules[module_name], class_name)
    made = kind(entries) if entries is not None else kind()
    vars(made).update(attributes or {})
    return made


def omegaconf(values: dict[str, Any]) -> Any:
    def node(value: object) -> Any:
        attributes = {"_metadata": foreign("omegaconf.base.Metadata"), "_val": value, "_parent": None}
        return foreign("omegaconf.nodes.AnyNode", attributes)

    content = {key: omegaconf(value) if isinstance(value, dict) else node(value) for key, value in values.items()}
    metadata = foreign("omegaconf.base.ContainerMetadata", {"object_type": dict})
    return foreign("omegaconf.dictconfig.DictConfig", {"_metadata": metadata, "_content": content, "_parent": None})


def prefixed(weights: dict[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    return OrderedDict((f"{prefix}{key}", tensor) for key, tensor in weights.items())


def other(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same shapes with other values."""
    return {key: tensor + 1 for key, tensor in weights.items()}


def optimizer(weights: dict[str, Tensor]) -> dict[str, Any]:
    """An Adam's state, twice as large as the weights."""
    state = {
        index: {"step": torch.tensor(3.0), "exp_avg": tensor + 2, "exp_avg_sq": tensor + 3}
        for index, tensor in enumerate(weights.values())
    }
    return {"state": state, "param_groups": [{"lr": 1e-3, "params": list(range(len(weights)))}]}


def lightning(weights: dict[str, Tensor], hyper_parameters: Any, **more: Any) -> dict[str, Any]:
    return {
        "epoch": 4,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(weights, "model."),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 5}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [optimizer(weights)],
        "lr_schedulers": [{"last_epoch": 4}],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
        **more,
    }


Weights = dict[str, Tensor]
#: Name -> the value that torch.save gets, of the weights to be found.
CHECKPOINTS: dict[str, Callable[[Weights], Any]] = {
    "plain": lambda w: w,
    "DataParallel": lambda w: prefixed(w, "module."),
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "compiled DDP": lambda w: prefixed(w, "module._orig_mod."),
    "FSDP": lambda w: prefixed(w, "_fsdp_wrapped_module."),
    "PyTorch ImageNet example": lambda w: {
        "epoch": 90,
        "arch": "lenet5",
        "state_dict": prefixed(w, "module."),
        "best_acc1": torch.tensor(76.1),
        "optimizer": optimizer(w),
        "scheduler": {"last_epoch": 90},
    },
    "torchvision reference": lambda w: {
        "model": w,
        "optimizer": optimizer(w),
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "args": argparse.Namespace(model="lenet5", data_path="/data", lr=0.1, workers=4),
        "scaler": {"scale": 65536.0},
    },
    "torchvision reference with EMA": lambda w: {
        "model": other(w),
        "model_ema": {**prefixed(w, "module."), "n_averaged": torch.tensor(7)},
        "args": argparse.Namespace(model="lenet5", data_path="/data"),
    },
    "timm": lambda w: {
        "epoch": 9,
        "arch": "lenet5",
        "state_dict": w,
        "optimizer": optimizer(w),
        "version": 2,
        "args": argparse.Namespace(model="lenet5", crop_pct=0.9, in_chans=1, mean=None, std=None),
        "amp_scaler": {"scale": 65536.0},
        "metric": 77.7,
    },
    "timm with EMA": lambda w: {
        "epoch": 9,
        "arch": "lenet5",
        "state_dict": other(w),
        "state_dict_ema": w,
        "args": argparse.Namespace(model="lenet5", crop_pct=0.9, in_chans=1),
    },
    "Lightning": lambda w: lightning(w, {"lr": 1e-3, "num_classes": 5}),
    "Lightning with a criterion": lambda w: lightning(w, {})
    | {"state_dict": prefixed(w, "model.") | {"criterion.weight": torch.ones(5)}},
    "Lightning, net.backbone": lambda w: lightning(w, {}) | {"state_dict": prefixed(w, "net.backbone.")},
    "Lightning with metrics": lambda w: lightning(w, {})
    | {"state_dict": prefixed(w, "model.") | {"val_acc.tp": torch.zeros(5), "train_acc.tp": torch.zeros(5)}},
    "Lightning AttributeDict": lambda w: lightning(
        w, foreign("lightning_fabric.utilities.data.AttributeDict", entries={"lr": 0.1})
    ),
    "Lightning with omegaconf": lambda w: lightning(w, omegaconf({"lr": 0.1, "model": {"name": "lenet5"}})),
    "Lightning with a path": lambda w: lightning(w, {"data": pathlib.PurePosixPath("/data")}),
    "Lightning with an EMA inside": lambda w: lightning(w, {})
    | {"state_dict": prefixed(other(w), "model.") | prefixed(w, "ema_model.")},
    "Lightning WeightAveraging": lambda w: lightning(w, {})
    | {"current_model_state": prefixed(other(w), "model."), "averaging_state": {"n_averaged": torch.tensor(3)}},
    "Lightning, whole module": lambda w: {"model": _network_of(w)},
    "Ignite": lambda w: {"model": w, "optimizer": optimizer(w), "trainer": foreign("ignite.engine.State", {"e": 3})},
    "fastai save": lambda w: {"model": w, "opt": {"hypers": [{"lr": 0.1}], "state": [{"mom": 0.9}]}},
    "fastai export": lambda w: foreign("fastai.learner.Learner", {"model": _network_of(w).model, "lr": 0.001}),
    "DeepSpeed module file": lambda w: {
        "module": w,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((key, tensor.shape) for key, tensor in w.items())],
        "ds_config": {"zero_optimization": {"stage": 1}},
        "ds_version": "0.15.0",
        "global_steps": 100,
    },
    "MMEngine": lambda w: {
        "meta": {"epoch": 3, "cfg": "model = dict()", "dataset_meta": {"classes": tuple("abcde")}},
        "state_dict": w,
        "message_hub": {"log_scalars": OrderedDict(), "runtime_info": OrderedDict(epoch=3)},
        "optimizer": optimizer(w),
    },
    "MMEngine with its EMA hook": lambda w: {
        "meta": {},
        "state_dict": w,
        "ema_state_dict": prefixed(other(w), "module.") | {"steps": torch.tensor(3)},  # swapped: the raw weights
    },
    "SWA": lambda w: prefixed(w, "module.") | {"n_averaged": torch.tensor(12)},
    "thop": lambda w: w | {"total_ops": torch.tensor(1.0), "conv1.total_ops": torch.zeros(1)},
    "yacs": lambda w: {"model": w, "cfg": foreign("yacs.config.CfgNode", entries={"MODEL": {"NAME": "x"}})},
    "mmcv config": lambda w: {"state_dict": w, "meta": foreign("mmengine.config.ConfigDict", entries={"a": 1})},
    "NumPy scalars": lambda w: {"model": w, "best": np.float32(0.5), "history": np.zeros(3)},
    "NumPy generator": lambda w: {"model": w, "rng": np.random.RandomState(0)},
    "a list": lambda w: [w, {"lr": 0.1}],
    "a tuple": lambda w: (3, w, optimizer(w)),
    "deep": lambda w: {"checkpoint": {"trainer": {"network": {"weights": w}}}},
    "best and last": lambda w: {"best_model": w, "last_model": other(w)},
    "best beside model": lambda w: {"model": other(w), "best_state": w},
    "model is a configuration": lambda w: {"model": {"name": "lenet5"}, "state_dict": w},
    "EMA of parameters alone": lambda w: {"model": w, "ema": {key: w[key] for key in list(w)}},
    "half precision": lambda w: {"model": {key: tensor.half() for key, tensor in w.items()}},
    "bfloat16": lambda w: {"model": {key: tensor.bfloat16() for key, tensor in w.items()}},
    "double precision": lambda w: {"model": {key: tensor.double() for key, tensor in w.items()}},
    "parameters, not tensors": lambda w: {"model": {key: nn.Parameter(tensor) for key, tensor in w.items()}},
    "PyTorch tutorial": lambda w: {
        "epoch": 5,
        "model_state_dict": w,
        "optimizer_state_dict": optimizer(w),
        "loss": torch.tensor(0.4),
    },
    "Catalyst": lambda w: {
        "model_state_dict": w,
        "criterion_state_dict": {"weight": torch.ones(5)},
        "optimizer_state_dict": optimizer(w),
        "epoch_metrics": {"valid": {"loss": 0.3}},
        "stage_key": "train",
    },
    "Composer": lambda w: {
        "state": {
            "model": prefixed(w, "module."),
            "optimizers": {"Adam": optimizer(w)},
            "timestamp": {"Timestamp": {"epoch": 3}},
        },
        "rng": [{"torch": torch.zeros(16, dtype=torch.uint8)}],
    },
    "Apex": lambda w: {"model": prefixed(w, "module."), "optimizer": optimizer(w), "amp": {"scaler0": {"s": 1.0}}},
    "Ultralytics": lambda w: {"epoch": -1, "model": None, "ema": _network_of(w).model.half(), "train_args": {}},
    "Lightning, compiled": lambda w: lightning(w, {}) | {"state_dict": prefixed(w, "model._orig_mod.")},
    "Lightning Fabric": lambda w: {"model": prefixed(w, "_forward_module."), "optimizer": optimizer(w), "iteration": 9},
    "Classy Vision": lambda w: {
        "classy_state_dict": {"base_model": {"model": {"trunk": w, "heads": {}}}, "meters": {"train": []}},
        "phase_idx": 3,
    },
    "skorch pickle": lambda w: foreign("skorch.classifier.NeuralNetClassifier", {"module_": _network_of(w).model}),
    "Opacus": lambda w: {"model": prefixed(w, "_module."), "privacy_accountant": {"history": [(1.0, 0.1, 5)]}},
    "Fairscale": lambda w: {"model": prefixed(w, "_fpw_module."), "train_loop": [{"e": 1}]},
    "Detectron2": lambda w: {"model": w, "__author__": "third party", "matching_heuristics": True, "iteration": 9},
    "ema_pytorch": lambda w: {
        "ema": {**prefixed(other(w), "online_model."), **prefixed(w, "ema_model.")}
        | {"initted": torch.tensor(True), "step": torch.tensor(99)}
    },
    "torch_ema": lambda w: {
        "model": w,
        "ema": {"decay": 0.99, "num_updates": 8, "shadow_params": list(w.values()), "collected_params": None},
    },
    "quantisation-aware training": lambda w: w
    | {
        "conv1.weight_fake_quant.fake_quant_enabled": torch.tensor([1]),
        "conv1.weight_fake_quant.activation_post_process.min_val": torch.zeros(1),
        "conv1.activation_post_process.scale": torch.ones(1),
    },
    "pruned": lambda w: {
        name: tensor
        for key, value in w.items()
        for name, tensor in (
            ((f"{key}_orig", value), (f"{key}_mask", torch.ones_like(value)))
            if key.endswith("weight")
            else ((key, value),)
        )
    },
    "numbers beside the weights": lambda w: {**w, "epoch": 3, "best_acc": 0.9, "arch": "mine"},
    "models in a list": lambda w: {"models": [w], "optimizers": [optimizer(w)]},
    "Horovod": lambda w: {"epoch": 1, "model": w, "optimizer": {"param_groups": [{"lr": 0.1}], "state": {}}},
    "encoder prefix": lambda w: {"state_dict": prefixed(w, "module.encoder."), "epoch": 90},
    "EMA of timm v3": lambda w: {"state_dict": other(w), "state_dict_ema": prefixed(w, "module."), "epoch": 3},
    "weight norm": lambda w: {
        name: tensor
        for key, value in w.items()
        for name, tensor in (
            ((f"{key}_g", value.flatten(1).norm(dim=1).view(-1, *[1] * (value.ndim - 1))), (f"{key}_v", 3 * value))
            if key.endswith("weight") and value.ndim > 1
            else ((key, value),)
        )
    },
    "parameters under two keys": lambda w: {"state_dict": w, "model": w, "epoch": 1},
    **{
        f"key {key}": lambda w, key=key: {"epoch": 1, key: w}  # type: ignore[misc]
        for key in ("model_state", "params", "network", "weights", "best_model", "module", "net", "ema", "G", "student")
    },
    "NumPy arrays": lambda w: {"net": {name: each.numpy() for name, each in w.items()}, "losses": np.zeros((3, 3))},
}  # fmt: skip


def _network_of(weights: Weights) -> Network:
    network = build_architecture("lenet5", ImageContract((1, 28, 28), 5)).module
    network.load_state_dict(weights)
    return Network(network)


def assert_teaches(path: Path, network: nn.Module, tolerance: float = 1e-5, **settings: Any) -> Teacher:
    teacher = load_teacher(path, fields=GREY, **settings)
    assert teacher.contract.num_classes == 5
    torch.testing.assert_close(teacher.module(IMAGES), network(IMAGES), atol=tolerance, rtol=tolerance)
    return teacher


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_a_checkpoint_teaches_at_the_first_try(name: str, network: nn.Module, tmp_path: Path) -> None:
    torch.save(CHECKPOINTS[name](dict(network.state_dict())), tmp_path / "t.pt")
    forget_foreign_modules()
    is_short = any(word in name for word in ("half", "bfloat", "Ultralytics"))
    assert_teaches(tmp_path / "t.pt", network, 0.1 if is_short else 1e-5)


def test_each_checkpoint_is_listed() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs" / "results" / "teachers.md").read_text(encoding="utf-8")
    row = page.partition("## Checkpoints\n")[2].partition("| nothing | ")[2].partition(" |\n")[0]
    assert row.split("; ") == list(CHECKPOINTS)
    assert len(CHECKPOINTS) >= 67


def test_raw_averaged_and_named_weights_are_chosen(network: nn.Module, tmp_path: Path) -> None:
    weights = dict(network.state_dict())
    torch.save({"model": weights, "model_ema": prefixed(other(weights), "module.")}, tmp_path / "t.pt")
    teacher = assert_teaches(tmp_path / "t.pt", network, weights="raw")
    assert teacher.requested_weights == "raw"
    assert_teaches(tmp_path / "t.pt", network, weights="model")
    averaged = load_teacher(tmp_path / "t.pt", fields=GREY)
    assert not torch.allclose(averaged.module(IMAGES), network(IMAGES))
    assert any("averaged weights taken from key model_ema (there is also model" in note for note in averaged.notes)
    with pytest.raises(DfadcError, match=r"no weights under 'nowhere'") as caught:
        load_teacher(tmp_path / "t.pt", fields=GREY, weights="nowhere")
    assert "model_ema" in caught.value.hint
    torch.save({"model": weights}, tmp_path / "t.pt")
    with pytest.raises(DfadcError, match="no ema weights"):
        load_teacher(tmp_path / "t.pt", fields=GREY, weights="ema")


def test_a_chosen_prefix(network: nn.Module, tmp_path: Path) -> None:
    weights = dict(network.state_dict())
    both = prefixed(weights, "first.") | prefixed(other(weights), "second.")
    torch.save(both, tmp_path / "t.pt")
    assert_teaches(tmp_path / "t.pt", network, weights="first")
    with pytest.raises(DfadcError, match=r"begin with first\.\* \(10\), second\.\* \(10\)") as caught:
        load_teacher(tmp_path / "t.pt", fields=GREY)
    assert "--teacher-weights PREFIX" in caught.value.hint


def test_several_networks_of_equal_claim_are_named_and_refused(network: nn.Module, tmp_path: Path) -> None:
    weights = dict(network.state_dict())
    torch.save({"net_a": weights, "net_b": other(weights)}, tmp_path / "t.pt")
    with pytest.raises(DfadcError, match="several sets of weights of the same shapes: net_a, net_b") as caught:
        load_teacher(tmp_path / "t.pt", fields=GREY)
    assert "--teacher-weights net_a" in caught.value.hint


def test_averaged_and_raw_weights_of_other_shapes_are_refused(network: nn.Module, tmp_path: Path) -> None:
    weights = dict(network.state_dict())
    ten = build_architecture("lenet5", ImageContract((1, 28, 28), 10)).module.state_dict()
    torch.save({"model": weights, "model_ema": ten}, tmp_path / "t.pt")
    with pytest.raises(DfadcError, match="averaged and raw weights of different shapes"):
        load_teacher(tmp_path / "t.pt", fields=GREY)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the format
        layer = torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8)
    torch.save({"fc.weight": layer, "fc.scale": torch.tensor(1.0)}, tmp_path / "t.pt")
    with pytest.raises(DfadcError, match="are quantised") as caught:
        load_teacher(tmp_path / "t.pt", fields=GREY)
    assert "float checkpoint" in caught.value.hint


def test_weights_that_would_lose_a_part_are_refused(network: nn.Module, tmp_path: Path) -> None:
    """A backbone's own classifier is not the network's."""
    weights = prefixed(dict(network.state_dict()), "backbone.") | {
        "head.weight": torch.ones(3, 5),
        "head.bias": torch.ones(3),
    }
    torch.save(weights, tmp_path / "t.pt")
    with pytest.raises(DfadcError, match=r"under 'backbone\.' fit lenet5, but head\.weight, head\.bias would be lost"):
        load_teacher(tmp_path / "t.pt", fields=GREY)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_by_their_index(kind: str, network: nn.Module, tmp_path: Path) -> None:
    weights = list(network.state_dict().items())
    names = [f"model-0000{index}-of-00002.{kind}" for index in (1, 2)]
    for name, part in zip(names, (weights[:4], weights[4:]), strict=True):
        (save_file if kind == "safetensors" else torch.save)(dict(part), tmp_path / name)
    places = {key: names[index >= 4] for index, (key, _) in enumerate(weights)}
    index = tmp_path / ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert_teaches(index, network)
    assert_teaches(tmp_path, network)
    index.write_text(json.dumps({"weight_map": places | {"more": "../elsewhere.bin"}}))
    with pytest.raises(DfadcError, match="elsewhere"):
        load_teacher(index, fields=GREY)


def test_folders_of_accelerate_and_deepspeed(network: nn.Module, tmp_path: Path) -> None:
    weights = dict(network.state_dict())
    accelerate = tmp_path / "accelerate"
    accelerate.mkdir()
    save_file(weights, accelerate / "model.safetensors")
    torch.save(optimizer(weights), accelerate / "optimizer.bin")
    torch.save({"step": 1}, accelerate / "scheduler.bin")
    (accelerate / "random_states_0.pkl").write_bytes(b"\x80\x02")
    assert assert_teaches(accelerate, network).path == accelerate / "model.safetensors"
    assert inspect_teacher(accelerate, fields=GREY).architecture == "lenet5"
    deepspeed = tmp_path / "deepspeed" / "global_step100"
    deepspeed.mkdir(parents=True)
    (tmp_path / "deepspeed" / "latest").write_text("global_step100")
    torch.save({"module": weights, "ds_version": "0.15"}, deepspeed / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, deepspeed / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert_teaches(tmp_path / "deepspeed", network)


def test_empty_weights_of_deepspeed_stage_3_are_named(network: nn.Module, tmp_path: Path) -> None:
    empty = {key: torch.empty(0) for key in network.state_dict()}
    torch.save({"module": empty, "ds_version": "0.15", "ds_config": {}}, tmp_path / "t.pt")
    with pytest.raises(DfadcError, match="ZeRO stage 3") as caught:
        load_teacher(tmp_path / "t.pt", fields=GREY)
    assert "zero_to_fp32.py" in caught.value.hint


def test_whole_networks_in_wrappers_teach(network: nn.Module, tmp_path: Path) -> None:
    for wrapped in (nn.DataParallel(network), torch.compile(network), Network(network)):
        torch.save({"model": wrapped}, tmp_path / "t.pt")
        assert_teaches(tmp_path / "t.pt", network)


def test_a_folder_of_several_files_names_them(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(DfadcError, match=r"it holds a\.pt, b\.pt"):
        load_teacher(tmp_path)


OTHER_FILES = {
    "Torch7": (b"\x04\0\0\0\x01\0\0\0\x03\0\0\0V 1\x0d\0\0\0nn.Sequential", "a Torch7 file"),
    "joblib": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x07sklearn", "joblib or scikit-learn"),
    "Paddle": (
        b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94(\x8c\x1aStructuredToParameterName@@\x94",
        "a PaddlePaddle checkpoint",
    ),
    "TFLite": (b"\x1c\0\0\0TFL3", "a TensorFlow Lite model"),
    "SavedModel": (b"\x08\x01\x12\x06\x0a\x04demo" + bytes(60), "a TensorFlow SavedModel"),
    "NumPy": (b"\x93NUMPY\x01\0", "a NumPy array"),
    "GGUF": (b"GGUF\x03\0\0\0", "a GGUF file"),
}


@pytest.mark.parametrize("name", list(OTHER_FILES))
def test_files_that_cannot_teach_are_named_with_the_way(name: str, tmp_path: Path) -> None:
    data, says = OTHER_FILES[name]
    (tmp_path / "t.pt").write_bytes(data)
    with pytest.raises(DfadcError, match=says) as caught:
        load_teacher(tmp_path / "t.pt")
    assert caught.value.hint


def test_an_archive_of_arrays_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", a=np.ones(3))
    with pytest.raises(DfadcError, match="an archive of NumPy arrays"):
        load_teacher(tmp_path / "t.npz")
