"""Nothing of a checkpoint runs: payloads, unknown classes and every opcode that could act."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import datetime as dt
import enum
import functools
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet18

from dfadc.errors import DfadcError
from dfadc.teacher.file_kind import FileKind
from dfadc.teacher.read import read_teacher_file
from dfadc.teacher.unpickle import InertGlobal, Record, inert_pickle_module

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS = {"conv.weight": torch.randn(4, 3, 3, 3), "fc.weight": torch.randn(2, 4), "fc.bias": torch.randn(2)}
RAN: list[str] = []


def payload(*_: object, **__: object) -> str:
    """A function that shows in RAN that it was called."""
    RAN.append("payload")
    return "ran"


class Acting:
    """Every hook that unpickling, comparing or printing could call shows that it ran."""

    def __new__(cls, *_: object) -> Self:
        payload()
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        payload()

    def __setstate__(self, state: object) -> None:
        payload()

    def __setitem__(self, key: object, value: object) -> None:
        payload()

    def append(self, value: object) -> None:
        payload()

    def __call__(self) -> None:
        payload()

    def __getattr__(self, name: str) -> object:
        payload()
        return payload

    def __reduce__(self) -> tuple[Any, ...]:
        return Acting, (1,), {"a": 1}, iter([1, 2]), iter([("k", 1)])


class Calls:
    """Unpickling it calls a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


class Shade(enum.Enum):
    GREY = 1


class Bag(dict[str, int]):
    """A dictionary of another class, as easydict and mmcv have it."""


@pytest.fixture(autouse=True)
def _nothing_ran() -> Any:
    RAN.clear()
    yield
    assert not RAN


def loads(data: bytes) -> Any:
    return inert_pickle_module().load(io.BytesIO(data))


def weights_of(path: Path) -> dict[str, Tensor]:
    contents = read_teacher_file(path)
    assert contents.state_dict is not None
    return dict(contents.state_dict)


PAYLOADS: dict[str, Callable[[Path], object]] = {
    "os.system": lambda target: Calls(os.system, f"touch {target}"),
    "subprocess": lambda target: Calls(subprocess.check_call, ["touch", str(target)]),
    "eval": lambda target: Calls(eval, f"open({str(target)!r}, 'w')"),
    "exec": lambda target: Calls(exec, f"open({str(target)!r}, 'w')"),
    "import": lambda target: Calls(builtins.__import__, "this"),
    "getattr": lambda target: Calls(getattr, Calls(builtins.__import__, "os"), "system"),
    "hub": lambda target: Calls(torch.hub.load, "a/b", "c"),
    "from bytes": lambda target: Calls(torch.storage._load_from_bytes, b"x"),  # noqa: SLF001
    "partial": lambda target: functools.partial(payload, 1),
    "partial called": lambda target: Calls(functools.partial(payload)),
    "nested": lambda target: Calls(payload, Calls(payload, Calls(payload))),
    "own class": lambda target: object.__new__(Acting),
    "map": lambda target: Calls(list, Calls(map, payload, [1])),
    "numpy": lambda target: Calls(np.load, str(target)),
    "rebuild": lambda target: Calls(torch._tensor._rebuild_from_type_v2, payload, Tensor, (), {}),  # noqa: SLF001
    "set state": lambda target: Calls(torch._utils._rebuild_parameter_with_state, payload, False, {}, {"__class__": 1}),  # noqa: SLF001
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", list(PAYLOADS))
def test_payloads_do_not_run(name: str, zipped: bool, tmp_path: Path) -> None:
    target = tmp_path / "was_run"
    value = {"model": WEIGHTS, "extra": PAYLOADS[name](target)}
    RAN.clear()  # object.__new__(Acting) ran nothing; what pickling runs is no matter
    torch.save(value, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
    RAN.clear()
    before = set(sys.modules)
    try:
        found = weights_of(tmp_path / "t.pt")
    except DfadcError as error:
        assert "not run" in error.message or "cannot" in error.message  # noqa: PT017 -- either outcome is safe
    else:
        assert found.keys() == WEIGHTS.keys()
    assert not target.exists()
    assert "this" not in set(sys.modules) - before


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_hook_of_an_unknown_class_runs(protocol: int) -> None:
    data = pickle.dumps([object.__new__(Acting), Shade.GREY, Bag(a=1)], protocol=protocol)
    RAN.clear()
    acting, shade, bag = loads(data)
    assert (acting.name, shade.name, bag.name) == (f"{__name__}.Acting", f"{__name__}.Shade", f"{__name__}.Bag")
    assert acting.attributes == {"a": 1}
    assert acting.elements == [1, 2]
    assert acting.entries == {"k": 1}
    assert shade.arguments == (1,)
    assert bag.entries == {"a": 1} or bag.arguments  # protocols 0 and 1 give the entries as arguments


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner), st.frozensets(SCALARS)
    ),
    max_leaves=12,
)


@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_values_come_back_as_they_were(value: Any, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol=protocol)) == value


GLOBALS = st.sampled_from(
    [
        *((__name__, "payload"), (__name__, "Acting"), ("functools", "partial"), ("builtins", "getattr")),
        *(("collections", "OrderedDict"), ("torch.nn.modules.conv", "Conv2d"), ("torch._utils", "_rebuild_tensor_v2")),
        *(("torch.nn.parameter", "Parameter"), ("copyreg", "_reconstructor"), ("builtins", "list"), ("a.b", "c")),
    ]
)
PUSHES = st.one_of(
    GLOBALS.map(lambda pair: b"c" + f"{pair[0]}\n{pair[1]}\n".encode()),
    st.sampled_from([b"N", b")", b"]", b"}", b"\x88", b"K\x05", b"\x8f", b"X\x07\x00\x00\x00forward", b"("]),
)
ACTS = st.sampled_from(
    [b"R", b"\x81", b"\x92", b"b", b"s", b"u", b"a", b"e", b"\x90", b"o", b"0", b"\x85", b"\x86", b"t"]
)


@given(st.lists(st.one_of(PUSHES, ACTS), max_size=40))
def test_no_sequence_of_opcodes_runs_anything(opcodes: list[bytes]) -> None:
    """A pickle need not come from a pickler: opcodes in any order call nothing of the file's choice either."""
    classes = {found: dict(vars(found)) for found in (nn.Conv2d, nn.Parameter, Record, InertGlobal, functools.partial)}
    harmless = (
        pickle.UnpicklingError,
        AttributeError,
        EOFError,
        IndexError,
        TypeError,
        ValueError,
        KeyError,
        RuntimeError,
    )
    with contextlib.suppress(*harmless):
        loads(b"\x80\x04" + b"".join(opcodes) + b".")
    assert not RAN
    assert all(dict(vars(found)) == before for found, before in classes.items())


def test_what_training_scripts_keep_beside_the_weights(tmp_path: Path) -> None:
    value = {
        "state_dict": WEIGHTS,
        "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/data"), when=dt.datetime(2026, 1, 2)),
        "best": np.float64(0.9),
        "history": np.arange(6.0).reshape(2, 3),
        "counts": collections.Counter("aab"),
        "default": collections.defaultdict(list, {"a": [1]}),
        "bag": Bag(a=1),
        "rng": np.random.default_rng(0).bit_generator.state,
        "callbacks": {
            "ModelCheckpoint{'monitor': 'x'}": {"best_k_models": {pathlib.PurePosixPath("a"): torch.tensor(1.0)}}
        },
        "shade": Shade.GREY,
        "kinds": {"dtype": torch.float16, "size": torch.Size([1, 2]), "device": torch.device("cpu")},
    }
    torch.save(value, tmp_path / "t.pt")
    contents = read_teacher_file(tmp_path / "t.pt")
    assert contents.state_dict is not None
    assert contents.state_dict.keys() == WEIGHTS.keys()
    assert {"argparse.Namespace", "pathlib.PurePosixPath", "datetime.datetime"} <= set(contents.inert)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_pickle_protocol_is_read(protocol: int, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    torch.save({"model": WEIGHTS}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    for name, tensor in weights_of(path).items():
        assert torch.equal(tensor, WEIGHTS[name])


def test_a_module_of_a_class_that_is_gone_yields_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = types.ModuleType("gone_with_the_laptop")
    gone = type("Gone", (nn.Module,), {"__module__": source.__name__})
    source.Gone = gone  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, source.__name__, source)
    network = gone()
    network.body = resnet18(num_classes=3)
    network.register_buffer("hidden", torch.ones(2), persistent=False)
    network.body.fc.register_forward_hook(payload)
    torch.save({"model": nn.DataParallel(network)}, tmp_path / "t.pt")
    monkeypatch.delitem(sys.modules, source.__name__)
    contents = read_teacher_file(tmp_path / "t.pt")
    assert contents.module is None
    assert contents.state_dict is not None
    assert contents.state_dict.keys() == network.state_dict().keys()
    assert "gone_with_the_laptop.Gone" in contents.inert


def test_a_library_network_with_an_unknown_part_is_weights_alone(tmp_path: Path) -> None:
    """It would not compute what it did."""
    network = resnet18(num_classes=3)
    network.fc.register_forward_hook(payload)
    torch.save(network, tmp_path / "t.pt")
    assert read_teacher_file(tmp_path / "t.pt").module is None


def write_tar_of_2016(path: Path, weights: dict[str, Tensor]) -> None:
    """A file of torch 0.1.9: four members, tensors written apart from the pickle that names them."""
    storages, tensors, table = io.BytesIO(), io.BytesIO(), io.BytesIO()
    for stream in (storages, tensors):
        pickle.dump(len(weights), stream, protocol=2)
    names = []
    for key, tensor in enumerate(weights.values()):
        storages.write(b"\x80\x02(K" + bytes([key]) + b"X\x03\x00\x00\x00cpuctorch\nFloatStorage\nt.")
        storages.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())
        tensors.write(b"\x80\x02(K" + bytes([100 + key, *b"K", key]) + b"ctorch\nFloatTensor\nt.")
        tensors.write(struct.pack("<ii", tensor.ndim, 0))
        tensors.write(struct.pack(f"<{2 * tensor.ndim}q", *tensor.shape, *tensor.stride()) + struct.pack("<q", 0))
        names.append(100 + key)
    pickle.dump([], storages, protocol=2)

    entries = OrderedDict(zip(weights, range(len(weights)), strict=True))
    table.write(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for name, index in entries.items():
        table.write(b"X" + struct.pack("<I", len(name)) + name.encode() + b"K" + bytes([names[index]]) + b"Q")
    table.write(b"u.")
    members: dict[str, bytes | io.BytesIO] = {
        "sys_info": pickle.dumps({}, 2),
        "pickle": table,
        "tensors": tensors,
        "storages": storages,
    }
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_tar_files_of_torch_0_1(tmp_path: Path) -> None:
    write_tar_of_2016(tmp_path / "t.pth", WEIGHTS)
    assert read_teacher_file(tmp_path / "t.pth").kind is FileKind.LEGACY_CHECKPOINT
    for name, tensor in weights_of(tmp_path / "t.pth").items():
        assert torch.equal(tensor, WEIGHTS[name])


def test_texts_of_python_2_are_read(tmp_path: Path) -> None:
    assert inert_pickle_module().load(io.BytesIO(b"\x80\x02U\x02\xe9a."), encoding="latin1") == "éa"
    torch.save({"model": WEIGHTS, "note": "x"}, tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    text = b"X\x01\x00\x00\x00x"
    assert text in members["t/data.pkl"]
    members["t/data.pkl"] = members["t/data.pkl"].replace(text, b"U\x01\xe9")
    with zipfile.ZipFile(tmp_path / "t.pt", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert weights_of(tmp_path / "t.pt").keys() == WEIGHTS.keys()


def test_half_precision_weights(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}, tmp_path / "t.pt")
        assert all(tensor.dtype is dtype for tensor in weights_of(tmp_path / "t.pt").values())


def test_an_archive_that_torch_would_run_as_a_script_is_code(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt", "a") as archive:
        archive.writestr("t/constants.pkl", b"\x80\x02).")
    with pytest.raises(DfadcError, match="is TorchScript, which is code"):
        read_teacher_file(tmp_path / "t.pt")
