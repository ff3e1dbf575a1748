"""Heads and forwards that people write: what a user types first, then the one flag that the error names."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import run_command, settings
from conftest import QUICK_RECIPE
from torch import Tensor, nn

from dfadc.cli import options
from dfadc.contract import ContractFields
from dfadc.errors import DfadcError
from dfadc.networks.factory import import_file
from dfadc.pipeline.distill import load_run_teacher
from dfadc.run_folder import open_run
from dfadc.teacher.load import Placement, load_teacher

HERE = Path(__file__).resolve().parent


class Case(NamedTuple):
    """A classifier of forwards.py.

    Args:
        name: of its class.
        flag: that the first try's error names; empty where the first try loads it.
        size: of its images.
        says: part of a note.
    """

    name: str
    flag: str = ""
    size: str = "3x12x12"
    says: str = ""


CASES = (
    Case("Classifier"),
    *(Case(name, "--num-classes 2") for name in ("OneLogit", "SqueezedAxis", "SqueezedAll", "FlattenedLogit")),
    Case("NamedOneLogit", "--num-classes 2", says="[0, z]"),
    Case("SigmoidLayer", "--num-classes 2", says="last sigmoid is left out"),
    *(
        Case(name, "--num-classes 2", says="input of its last sigmoid")
        for name in ("SigmoidFunction", "SigmoidOfATensor", "SigmoidUsedTwice")
    ),
    Case("BothProbabilities", says="log p are the logits"),
    Case("SigmoidPerClass", says="task multilabel"),
    Case("SoftmaxLayer", says="last softmax is left out"),
    *(Case(name, says="log p") for name in ("SoftmaxFunction", "SoftmaxOfTwo", "ExpOfLogSoftmax")),
    *(Case(name, says="log-probabilities") for name in ("LogSoftmaxFunction", "LogSoftmaxLayer")),
    Case("LogitsAndFeatures", "--output 0"),
    Case("FeaturesAndLogits", "--output 1"),
    *(
        Case(name, says="of several outputs 0 is taken")
        for name in ("LogitsAndNone", "LogitsAndProbabilities", "LogitsAndAttention", "LogitsAndFeatureMaps")
    ),
    Case("LogitsAndReconstruction", "--output 0"),
    Case("TwoClassifiers", "--output 0"),
    Case("AuxiliaryInTraining"),
    Case("DeepSupervision", "--output 2"),
    *(Case(name) for name in ("LogitsInADict", "OutInADict", "LibraryOutput")),
    Case("OtherKeyInADict", says="cls is taken"),
    Case("TwoTasks", "--output breed"),
    Case("NestedTasks", "--output heads.breed"),
    Case("TasksInATuple", "--output 1"),
    Case("ListOfOne", says="0 is taken"),
    Case("NamedFields", says="prediction is taken"),
    Case("DataClass", says="scores is taken"),
    Case("PlainObject", says="pred is taken"),
    *(Case(name, says="are flattened") for name in ("Conv1x1", "OneAxisBehind", "OneAxisBefore")),
    *(Case(name) for name in ("Temperature", "Cosine", "ArcFace", "LastLayerIsAnother", "Wrapper", "Ensemble")),
    *(Case(name) for name in ("FlagWithDefault", "AnyArguments", "MaskWithDefault")),
    Case("Grey", size="1x12x9"),
    Case("FourChannels", size="4x12x12"),
    Case("SixteenChannels", size="16x9x20"),
    *(Case(name, size="3x10x14", says="(N, H, W, C)") for name in ("ChannelsLast", "ChannelsLastInATuple")),
    Case("FlatVectors", size="3x8x8", says="(N, C*H*W)"),
    Case("Rows", size="1x12x12", says="(N, H, W)"),
    *(Case(name) for name in ("NormalisesInside", "SwapsChannels", "Resizes", "ChecksShapes", "OwnDevice")),
    Case("PixelsUpTo255", says="--std 0.0039"),
    Case("ViewOfTheBatch", says="contiguous"),
    *(Case(name) for name in ("ViewOfANumber", "Prints")),
    Case("InPlace", says="in place"),
    Case("RepeatsGrey", size="1x12x12"),
    Case("DropoutAlwaysOn", says="random outputs"),
    *(Case(name, says="no_grad") for name in ("FrozenBackbone", "ForwardWithoutGradients")),
    Case("Wide", says="--mean, --std or the value range may be wrong"),
    Case("Pixels"),
    *(Case(name, "--num-classes 2") for name in ("OneChannelOfPixels", "SigmoidOfPixels")),
    Case("SoftmaxOfPixels"),
    Case("PixelsAndALabel", "--output 0"),
)
#: No classifier, or none with a gradient: class -> part of the error.
REFUSED = {
    "Indices": "class indices",
    "SoftmaxOverTheBatch": "mixes the images of a batch",
    "Arrays": "ndarray without tensors",
    "TwoImages": "second input",
    "Bytes": "uint8 images",
    "Nothing": "NoneType",
    "FeaturesAlone": "--output 1",
}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(tmp_path, "forwards.py").write_text((HERE / "forwards.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in ("forwards", "dfadc_user_forwards"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def saved(name: str) -> nn.Module:
    """A network with large random weights, whose answers differ from image to image."""
    module = import_file(Path("forwards.py"))
    torch.manual_seed(0)
    network: nn.Module = module.NamedOneLogit(1) if name == "NamedOneLogit" else getattr(module, name)()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    torch.save(network.eval().state_dict(), "t.pt")
    return network


def expected(network: nn.Module, images: Tensor) -> Tensor:
    scores: Tensor = network.scores(images)  # type: ignore[operator]
    return torch.cat([torch.zeros_like(scores), scores], 1) if scores.shape[1] == 1 else scores


def words(case: Case) -> list[str]:
    return ["t.pt", "--teacher-arch", f"forwards.py:{case.name}", "--input-size", case.size]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_forward_loads_at_once_or_with_the_flag_that_the_error_names(case: Case) -> None:
    network = saved(case.name)
    outcome = run_command("inspect", *words(case))
    assert "Traceback" not in outcome.err
    if case.flag:
        assert "outputs" in outcome.out
        assert "finite logits" not in outcome.out
        assert case.flag in outcome.err
        outcome = run_command("inspect", *words(case), *case.flag.split())
    assert outcome.code == 0, outcome.err
    assert "finite logits" in outcome.out, outcome.out + outcome.err
    assert case.says in outcome.out.replace("\n", " ")
    given = dict(zip(re.findall(r"--([a-z-]+)", case.flag), case.flag.split()[1::2], strict=True))
    classes = given.get("num-classes")
    fields = options.contract_fields(
        case.size, None, None, None if classes is None else int(classes), given.get("task")
    )
    teacher = load_teacher("t.pt", architecture=f"forwards.py:{case.name}", fields=fields, output=given.get("output"))
    assert_same_logits(teacher.module, network, teacher.contract.input_size)
    assert teacher.requested_output == given.get("output")


def assert_same_logits(module: nn.Module, network: nn.Module, size: tuple[int, int, int]) -> None:
    """Equal but for what a softmax does not see, for single images too, with a gradient to them."""
    generator = torch.Generator().manual_seed(3)
    for count in (1, 4):
        images = torch.randn(count, *size, generator=generator)
        leaf = images.clone().requires_grad_()
        logits = module(leaf)
        wanted = expected(network, images)
        assert logits.shape == wanted.shape
        if type(network).__name__ != "DropoutAlwaysOn":
            torch.testing.assert_close(logits.log_softmax(1), wanted.log_softmax(1), rtol=1e-3, atol=1e-3)
        (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())
    with torch.no_grad():
        assert not module(images).requires_grad


@pytest.mark.parametrize("kind", ["traced", "scripted", "exported"])
@pytest.mark.parametrize("name", ["SigmoidFunction", "SigmoidLayer", "SoftmaxFunction", "LogitsAndFeatures"])
@pytest.mark.filterwarnings("ignore")
def test_heads_of_code_files(name: str, kind: str) -> None:
    """TorchScript takes no hooks and shows no calls; an exported program refuses train() and eval()."""
    network = saved(name)
    images = torch.rand(2, 3, 12, 12)
    if kind == "exported":
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), "t.pt2")
    else:
        made = torch.jit.trace(network, images) if kind == "traced" else torch.jit.script(network)
        torch.jit.save(made, "t.pt2")
    output = "0" if name == "LogitsAndFeatures" else None
    classes = 2 if name.startswith("Sigmoid") else None
    fields = ContractFields(input_size=(3, 12, 12), num_classes=classes)
    teacher = load_teacher("t.pt2", fields=fields, output=output, trust=True).placed(Placement())
    assert_same_logits(teacher.module, network, (3, 12, 12))


@pytest.mark.parametrize(
    "case", [Case("SigmoidFunction", "--num-classes 2"), Case("TwoTasks", "--output breed")], ids=lambda case: case.name
)
def test_a_run_from_the_command_to_a_verified_student(case: Case) -> None:
    network = saved(case.name)
    architecture = f"forwards.py:{case.name}"
    flags = ("--input-size", case.size, "--mean", "0,0,0", "--std", "1,1,1", *case.flag.split())
    quick = settings({**QUICK_RECIPE, "steps": 2, "verify.min_agreement": 0})
    outcome = run_command(
        *("distill", "t.pt", "--teacher-arch", architecture, *flags, "--student", "compact_resnet_4", *quick),
        *("--export", "onnx", "--out", "run"),
    )
    assert "Traceback" not in outcome.err
    assert outcome.code in (0, 3), outcome.err
    run = open_run(Path("run"))
    assert run_command("verify", "run", "--factory", architecture).code == outcome.code
    with pytest.raises(DfadcError, match="would import code"):
        load_run_teacher(run)
    teacher = load_run_teacher(run, factories=[architecture])
    assert_same_logits(teacher.module, network, teacher.contract.input_size)
    session = onnxruntime.InferenceSession("run/artifacts/student.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(None, {session.get_inputs()[0].name: np.zeros((3, 3, 12, 12), np.float32)})[0]
    assert logits.shape == (3, teacher.contract.num_classes)
    if case.name == "TwoTasks":
        Path("run/run.json").write_text(Path("run/run.json").read_text().replace('"breed"', '"age"'))
        with pytest.raises(DfadcError, match="7"):
            load_run_teacher(run, factories=[architecture])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_classifier_is_refused_with_the_reason(name: str) -> None:
    saved(name)
    fields = options.contract_fields("3x12x12", None, None, None)
    with pytest.raises(DfadcError) as caught:
        load_teacher("t.pt", architecture=f"forwards.py:{name}", fields=fields)
    assert REFUSED[name] in f"{caught.value.message}; {caught.value.hint}"
    assert caught.value.exit_code == 2


def test_a_sidecar_states_the_output() -> None:
    network = saved("TwoTasks")
    arguments = words(next(case for case in CASES if case.name == "TwoTasks"))
    outcome = run_command("inspect", *arguments, "--output", "breed", "--write-sidecar")
    assert outcome.code == 0, outcome.err
    assert 'output = "breed"' in Path("t.toml").read_text()
    outcome = run_command("inspect", *arguments)
    assert "finite logits" in outcome.out, outcome.out + outcome.err
    teacher = load_teacher("t.pt", architecture="forwards.py:TwoTasks")
    assert teacher.requested_output == "breed"
    images = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(teacher.logits(images), expected(network, images))


def test_each_forward_is_listed_with_what_was_typed() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 67
    page = (HERE.parents[1] / "docs" / "results" / "teachers.md").read_text(encoding="utf-8")
    listed = re.search(r"## Heads and forwards\n(.*?)\n## ", page, re.DOTALL)
    assert listed is not None
    rows = [line.strip("| ").split(" | ") for line in listed[1].splitlines() if line.startswith("| ")]
    typed = {name: words.strip("`") for words, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert typed == {case.name: case.flag or "nothing" for case in CASES} | dict.fromkeys(REFUSED, "refused")
    assert f"{len(CASES)} classifiers" in listed[1]
