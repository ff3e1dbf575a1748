"""Loss of INT8 by calibration images: generated, random noise, or real ones. Prints Markdown.

    python examples/fashion_mnist/compare_calibration.py RUN --data test_10000.npz --train-images FOLDER

quantises the fp32 ONNX of a finished run once for each pool and preset, every pool as large as the run's own and each
judged by itself as an export judges it, and asks the result about the labelled images of ``--data``. They choose
nothing. Without ``--train-images`` (a folder with the idx file of Fashion-MNIST's training images, or an .npz) there is
no row for real images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from train_teacher import FILE_PREFIXES, read_idx

from dfadc import open_run
from dfadc.array_file import read_arrays
from dfadc.cli.script import run_as_script
from dfadc.errors import DfadcError
from dfadc.evaluation.labelled_images import EvaluationData, load_evaluation_data
from dfadc.sampling.calibration import load_images
from dfadc.verification.agreement import compare
from dfadc.verification.stored_images import dequantise, quantise
from exporters.exporter import PoolUnusable
from exporters.to_onnx.file import load_onnx
from exporters.to_onnx.int8.presets import PRESETS
from exporters.to_onnx.int8.quantise import quantise as quantise_graph
from exporters.to_onnx.int8.sensitivity import logits_of

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from dfadc.contract import ImageContract
    from dfadc.run_folder import RunFolder

BATCH_SIZE = 500


def main(
    run: Annotated[Path, typer.Argument(help="A finished run with artifacts/student.onnx.")],
    *,
    data: Annotated[Path, typer.Option(help="Labelled test images, .npz: they evaluate, they choose nothing.")],
    train_images: Annotated[Path | None, typer.Option(help="Folder of the idx files, or .npz: real images.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, and of which real images are taken.")] = 0,
) -> None:
    """Prints what INT8 loses for each kind of calibration images."""
    folder = open_run(run)
    contract = folder.contract()
    source = load_onnx(folder.artifacts / "student.onnx")
    labelled = load_evaluation_data(data, contract)
    reference, accuracy = evaluate(source, labelled)
    print(f"fp32: {accuracy:.2%} of {len(labelled):,} images\n")
    print("| calibrated with | preset | calibrator | agreement with fp32 | SQNR | accuracy | loss (points) |")
    print("|---|---|---|---|---|---|---|")
    for name, pool in make_pools(folder, contract, train_images, seed).items():
        for preset in PRESETS:
            try:
                quantised = quantise_graph(source, pool, preset=preset)
            except PoolUnusable as exc:
                print(f"| {name} | {preset} | – | {exc.message} | – | – | – |")
                continue
            logits, int8_accuracy = evaluate(quantised.model, labelled)
            found = compare(logits, reference)
            print(
                f"| {name} | {preset} | {quantised.calibrator} | {found.agreement:.2%} | {found.sqnr_db:.1f} dB "
                f"| {int8_accuracy:.2%} | {100 * (accuracy - int8_accuracy):+.2f} |",
                flush=True,
            )


def make_pools(
    run: RunFolder, contract: ImageContract, train_images: Path | None, seed: int
) -> dict[str, NDArray[np.float32]]:
    """Equally many normalised images (N, C, H, W) of each kind; all of them pass through 8-bit pixels."""
    generated = dequantise(load_images(run.calibration, input_size=contract.input_size), contract)
    rng = np.random.default_rng(seed)
    uniform = rng.integers(0, 256, generated.shape, np.uint8)
    normal = quantise(rng.standard_normal(generated.shape, np.float32), contract)
    pools = {
        "generated images": generated,
        "uniform noise": dequantise(uniform, contract),
        "normal noise": dequantise(normal, contract),
    }
    if train_images is not None:
        real = read_train_images(train_images, contract)
        chosen = rng.permutation(len(real))[: len(generated)]
        pools["real images"] = dequantise(real[np.sort(chosen)], contract)
    return pools


def read_train_images(path: Path, contract: ImageContract) -> NDArray[np.uint8]:
    """(N, C, H, W) pixels of the training images."""
    if path.is_dir():
        images = read_idx(path, f"{FILE_PREFIXES['train']}-images-idx3-ubyte")[:, None]
    else:
        images = read_arrays(path, ("images",))["images"]
    if images.dtype != np.uint8 or images.shape[1:] != contract.input_size:
        raise DfadcError(f"{path} holds {images.dtype} images of {images.shape[1:]}, not uint8 {contract.input_size}")
    return images


def evaluate(model: onnx.ModelProto, labelled: EvaluationData) -> tuple[NDArray[np.float32], float]:
    """Answers (N, K) to the labelled images, and the share of them that are the label."""
    logits = np.concatenate([logits_of(model, images) for images in labelled.batches(BATCH_SIZE)])
    return logits, float((logits.argmax(axis=1) == labelled.labels).mean())


if __name__ == "__main__":
    run_as_script(main)
