"""Measures the baseline gate's rates of detected damage and of false alarms, on the student of a finished run.

    python examples/ci/measure_the_gate.py runs/demo --data labelled.npz --redistilled runs/seed-*

20 students, each damaged until it has lost 3 points of its agreement with the teacher on the compared samples and no
further; 20 re-quantisations of the unharmed one, each calibrated with images that were drawn anew; and the students of
the runs of `--redistilled`, which differ from the first in their seeds alone. Every one is compared with the run's
baseline with `--max-drop 0.01`; only comparison D counts. The drop of real accuracy is printed beside it: the two need
not be equal. The run needs `student.onnx` and, to be re-quantised, `student.int8.onnx`; the others `student.onnx`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx
import safetensors
import torch
from onnx import numpy_helper
from prove_the_gate_blocks import multiply

from dfadc import VerifySettings, open_run
from dfadc.distillation.generator.networks import build_generator
from dfadc.evaluation.labelled_images import load_evaluation_data
from dfadc.pipeline.baseline import write_baseline
from dfadc.pipeline.distill import load_run_teacher
from dfadc.pipeline.verify import verify_file
from dfadc.recipe.schema import GeneratorSettings
from dfadc.sampling.calibration import choose_calibration, load_images
from dfadc.verification.regression import GATED_SOURCE
from dfadc.verification.samples import SampleSet
from dfadc.verification.stored_images import dequantise, quantise
from exporters.to_onnx.int8.quantise import quantise as quantise_graph
from exporters.to_onnx.int8.sensitivity import logits_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from dfadc.contract import ImageContract
    from dfadc.evaluation.labelled_images import EvaluationData
    from dfadc.run_folder import RunFolder
    from dfadc.verification.stored_images import StoredImages

#: Damaged at least so much on the compared samples; each try is a fifth stronger than the one before.
DAMAGE = 0.03
STRONGER = 1.2
MAX_DROP = 0.01
FP32, INT8 = "student.onnx", "student.int8.onnx"
#: Calibration images of a re-quantisation; half of them of the run's reservoir.
NUM_CALIBRATION = 512


def add_noise(weights: list[onnx.TensorProto], strength: float, dice: np.random.Generator) -> None:
    """Noise on every weight, in standard deviations of its tensor."""
    for tensor in weights:
        values = numpy_helper.to_array(tensor)
        noise = (strength * values.std() * dice.standard_normal(values.shape)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values + noise, tensor.name))


def spoil_one_layer(weights: list[onnx.TensorProto], strength: float, dice: np.random.Generator) -> None:
    """The same on one layer, stronger."""
    add_noise([weights[dice.integers(len(weights))]], 4 * strength, dice)


def drop_weights(weights: list[onnx.TensorProto], strength: float, dice: np.random.Generator) -> None:
    """Sets a random share of all weights to zero."""
    for tensor in weights:
        multiply(tensor, (dice.random(tuple(tensor.dims)) >= min(0.9, strength)).astype(np.float32))


def weaken_channels(weights: list[onnx.TensorProto], strength: float, dice: np.random.Generator) -> None:
    """Halves a random share of each layer's output channels."""
    for tensor in weights:
        factors = np.where(dice.random(tensor.dims[0]) < min(0.9, strength), 0.5, 1.0).astype(np.float32)
        multiply(tensor, factors.reshape(-1, *[1] * (len(tensor.dims) - 1)))


DAMAGES: dict[str, Callable[[list[onnx.TensorProto], float, np.random.Generator], None]] = {
    "noise on all weights": add_noise,
    "noise on one layer": spoil_one_layer,
    "weights set to zero": drop_weights,
    "channels weakened": weaken_channels,
}


class Compared(NamedTuple):
    """The samples that the gate compares, and labelled images."""

    images: NDArray[np.float32]
    teacher: NDArray[np.int64]
    labelled: EvaluationData

    def rates(self, model: onnx.ModelProto) -> tuple[float, float]:
        """Agreement with the teacher on the samples, and accuracy on the labelled images."""
        agreed = logits_of(model, self.images).argmax(axis=1) == self.teacher
        answers = [logits_of(model, batch).argmax(axis=1) for batch in self.labelled.batches(500)]
        return float(agreed.mean()), float((np.concatenate(answers) == self.labelled.labels).mean())


def damaged(model: onnx.ModelProto, kind: str, seed: int, compared: Compared) -> onnx.ModelProto:
    """A copy that lost ``DAMAGE`` on the compared samples, by the weakest damage on a ladder that does it."""
    before = (logits_of(model, compared.images).argmax(axis=1) == compared.teacher).mean()
    strength = 0.01
    while True:
        worse = onnx.ModelProto()
        worse.CopyFrom(model)
        weights = [tensor for tensor in worse.graph.initializer if len(tensor.dims) >= 2]
        DAMAGES[kind](weights, strength, np.random.default_rng(seed))
        if before - (logits_of(worse, compared.images).argmax(axis=1) == compared.teacher).mean() >= DAMAGE:
            return worse
        strength *= STRONGER


class Calibrator:
    """Draws calibration images of a run anew: other latents for its two generators, another half of its reservoir.

    Args:
        run: finished.
        samples: its verification samples, of which none may be among them.
    """

    def __init__(self, run: RunFolder, samples: SampleSet) -> None:
        self.contract = run.contract()
        self.exclude = samples.images
        self.teacher = load_run_teacher(run).module
        self.generators = {path.stem: _load_generator(path, self.contract) for path in (run.generator, run.prior)}
        with np.load(run.calibration, allow_pickle=False) as stored:
            of_reservoir = stored["source"] == stored["sources"].tolist().index("reservoir")
        self.reservoir = load_images(run.calibration, input_size=self.contract.input_size)[of_reservoir]

    def draws(self, count: int) -> Iterator[NDArray[np.float32]]:
        """As many sets of normalised images (N, C, H, W)."""
        yield from map(self._draw, range(count))

    @torch.no_grad()
    def _draw(self, seed: int) -> NDArray[np.float32]:
        dice = torch.Generator().manual_seed(seed)
        candidates = {"reservoir": self.reservoir[torch.randperm(len(self.reservoir), generator=dice).numpy()]}
        for name, (generator, latent_dim) in self.generators.items():
            images = generator(torch.randn(NUM_CALIBRATION, latent_dim, generator=dice)).numpy()
            candidates[name] = quantise(images, self.contract)
        answers = {name: self._answers(images) for name, images in candidates.items()}
        chosen = choose_calibration(candidates, answers, num_images=NUM_CALIBRATION, exclude=self.exclude)
        return dequantise(chosen.images, self.contract)

    def _answers(self, images: StoredImages) -> NDArray[np.float32]:
        answers: NDArray[np.float32] = self.teacher(torch.from_numpy(dequantise(images, self.contract))).numpy()
        return answers


def _load_generator(path: Path, contract: ImageContract) -> tuple[torch.nn.Module, int]:
    """A run's generator in eval mode, and the length of its latents."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        settings = GeneratorSettings.model_validate_json(metadata["dfadc.generator"])
        generator = build_generator(settings, contract, bounded=json.loads(metadata["dfadc.bounded"]))
        generator.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 -- not a mapping
    return generator.eval(), settings.latent_dim


class Judge:
    """Runs `dfadc verify FILE --samples … --baseline … --max-drop 0.01` by its Python function.

    Args:
        run: gives the samples, and the baseline that is frozen of it.
        scratch: a folder for files.
    """

    def __init__(self, run: RunFolder, scratch: Path) -> None:
        self.run = run
        self.scratch = scratch
        # Networks of other runs have another student than the samples: there is no comparison A with it.
        self.settings = VerifySettings(
            baseline=scratch / "baseline.npz",
            gates=[f"verify.max_baseline_drop={MAX_DROP}", "verify.compare_export=false"],
        )
        write_baseline(run, scratch / "baseline.npz")

    def known(self, name: str) -> onnx.ModelProto:
        """The run's own artifact."""
        return onnx.load(self.run.artifacts / name)

    def fails(self, model: onnx.ModelProto, name: str) -> bool:
        """True if comparison D fails a model; the baseline must hold this file name."""
        onnx.save(model, self.scratch / name)
        report = verify_file(self.scratch / name, self.run.samples, self.settings)
        checks = [check for check in report["artifacts"][name]["checks"] if check["comparison"].startswith("D")]
        if not checks:
            sys.exit(f"{name} was not compared with the baseline")
        return any(check["verdict"] == "FAIL" for check in checks)


def main() -> None:
    """Damages, re-quantises, judges, and prints a table of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--data", type=Path, required=True, help="labelled images: they only stand beside")
    parser.add_argument("--seeds", type=int, default=5, help="of each of the four kinds of damage")
    parser.add_argument("--draws", type=int, default=20, help="re-quantisations")
    parser.add_argument("--redistilled", type=Path, nargs="*", default=[], help="runs of other seeds")
    arguments = parser.parse_args()
    run = open_run(arguments.run)
    paths = [run.artifacts / name for name in ((FP32, INT8) if arguments.draws else (FP32,))]
    if lacking := [path.name for path in paths if not path.is_file()]:
        parser.error(f"{arguments.run} lacks {', '.join(lacking)}: dfadc export {arguments.run} -e onnx -e onnx:int8")
    samples = SampleSet.load(run.samples)
    gated = samples.of_source(GATED_SOURCE)
    compared = Compared(
        samples.normalised()[gated],
        samples.teacher_logits[gated].argmax(axis=1),
        load_evaluation_data(arguments.data, run.contract()),
    )
    with tempfile.TemporaryDirectory() as scratch:
        judge = Judge(run, Path(scratch))
        print(f"{int(gated.sum())} samples are compared\n")
        fp32 = judge.known(FP32)
        if arguments.seeds:
            measure_damage(fp32, compared, judge, num_seeds=arguments.seeds)
        if arguments.draws:
            draws = enumerate(Calibrator(run, samples).draws(arguments.draws))
            requantised = ((f"calibration draw {draw}", quantise_graph(fp32, pool).model) for draw, pool in draws)
            measure_false_alarms(INT8, requantised, compared, judge)
        if arguments.redistilled:
            redistilled = ((str(path), onnx.load(open_run(path).artifacts / FP32)) for path in arguments.redistilled)
            measure_false_alarms(FP32, redistilled, compared, judge)


def measure_damage(fp32: onnx.ModelProto, compared: Compared, judge: Judge, *, num_seeds: int) -> None:
    """Prints which of ``DAMAGES`` are detected, each with several seeds."""
    print("| damage | seed | drop on the samples | real drop | caught |\n|---|---|---|---|---|")
    before, caught = compared.rates(fp32), 0
    damages = [(kind, seed) for kind in DAMAGES for seed in range(num_seeds)]
    for kind, seed in damages:
        worse = damaged(fp32, kind, seed, compared)
        found = judge.fails(worse, FP32)
        caught += found
        print(f"| {kind} | {seed} | {drops(before, compared.rates(worse))} | {'yes' if found else 'NO'} |", flush=True)
    print(f"\ncaught: {caught} of {len(damages)}\n")


def measure_false_alarms(
    name: str, others: Iterator[tuple[str, onnx.ModelProto]], compared: Compared, judge: Judge
) -> None:
    """Prints which of the others fail, each compared with the artifact of this name in the baseline."""
    print("| made anew | drop on the samples | real drop | fails |\n|---|---|---|---|")
    before, verdicts = compared.rates(judge.known(name)), []
    for made, other in others:
        verdicts.append(judge.fails(other, name))
        shown = drops(before, compared.rates(other))
        print(f"| {made} | {shown} | {'YES' if verdicts[-1] else 'no'} |", flush=True)
    print(f"\nfalse alarms: {sum(verdicts)} of {len(verdicts)}\n")


def drops(before: tuple[float, float], after: tuple[float, float]) -> str:
    """Both differences in points, as two cells."""
    return " | ".join(f"{100 * (was - now):.1f}" for was, now in zip(before, after, strict=True))


if __name__ == "__main__":
    main()
