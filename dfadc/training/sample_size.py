"""Number of verification samples: as many as the gates need, and as fit into a file of moderate size. Free of torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from dfadc.verification.pixel_scores import MIN_IMAGES
from dfadc.verification.rates import Z_95, wilson_interval
from dfadc.verification.samples import sample_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dfadc.contract import ImageContract
    from dfadc.recipe.schema import VerifySettings

#: Samples are added up to this size of the file; what the gates need is taken also where it is more.
FILE_BYTES = 64 * 2**20
#: Times as many samples as a perfect copy needs, so that a few ties are not the end of it.
_SPARE = 1.25


def choose_num_samples(settings: VerifySettings, contract: ImageContract) -> int:
    """Samples of all sources together: ``num_samples``, or fewer where images are large, but enough for every gate."""
    needed = max((_fewest(gate, share, contract) for gate, share in _bounds(settings)), default=2)
    affordable = FILE_BYTES // sample_bytes(contract)
    return max(2, min(settings.num_samples, max(affordable, math.ceil(_SPARE * needed))))


def check_gates_can_pass(settings: VerifySettings, contract: ImageContract, precisions: Iterable[str] = ()) -> None:
    """Refuses gates that a perfect copy could not pass on this number of samples.

    Args:
        settings: the gates, and how many samples there may be.
        contract: of the images.
        precisions: "fp16", "int8", ... of the artifacts that will be judged besides the student.

    Raises:
        DfadcError: a limit is out of reach; says how many samples it takes.
    """
    concerned = {"verify.min_agreement", *(f"verify.min_{precision}_agreement" for precision in precisions)}
    total = choose_num_samples(settings, contract)
    for gate, share in _bounds(settings):
        name, limit = gate
        if name not in concerned:
            continue
        if limit >= 1:
            raise DfadcError(
                f"{name} = {limit:g} cannot be reached: the lower bound of a 95 % interval is below 1 for any number "
                "of samples",
                f"set it to 0.999 or less, or {name}=off",
            )
        fewest = _fewest(gate, share, contract)
        if fewest > total:
            raise DfadcError(
                f"{name} = {limit:g} cannot be reached with verify.num_samples = {settings.num_samples}: even if all "
                f"{total} samples agreed, the lower bound would stay below it",
                f"set verify.num_samples to {math.ceil(_SPARE * fewest)} or more, or lower {name}",
            )


def check_accuracy_can_pass(limit: float, num_images: int, contract: ImageContract) -> None:
    """Refuses a gate on accuracy that not even all labelled images answered rightly would pass.

    Raises:
        DfadcError: there are too few images for the limit.
    """
    best = wilson_interval(num_images, num_images)[0]
    if contract.is_dense:
        best = float(num_images >= MIN_IMAGES)
    if best < limit:
        raise DfadcError(
            f"verify.min_accuracy = {limit:g} cannot be reached: {num_images} of {num_images} labelled images would "
            f"only show {best:.2%}",
            "pass more labelled images with --data, or lower verify.min_accuracy",
        )


def size_note(settings: VerifySettings, contract: ImageContract) -> str | None:
    """A remark on the number of samples and the size of their file where images are large; None elsewhere."""
    total = choose_num_samples(settings, contract)
    if total == settings.num_samples:
        return None
    size = total * sample_bytes(contract) / 2**20
    return f"{total:,} verification samples instead of {settings.num_samples:,}, for their file takes {size:,.0f} MiB"


def _bounds(settings: VerifySettings) -> list[tuple[tuple[str, float], float]]:
    """Every gate on a lower bound, as name and limit, and the share of the samples that it looks at."""
    limits: dict[str, tuple[float | str, float]] = {
        "verify.min_agreement": (settings.min_agreement, 1 / 2),
    }
    if settings.compare_export:
        limits["verify.min_fp16_agreement"] = (settings.min_fp16_agreement, 1)
        limits["verify.min_int8_agreement"] = (settings.min_int8_agreement, 1)
    return [((name, limit), share) for name, (limit, share) in limits.items() if not isinstance(limit, str)]


def _fewest(gate: tuple[str, float], share: float, contract: ImageContract) -> int:
    """Samples that a perfect copy needs in all where a gate looks at a ``share`` of them.

    The lower Wilson bound of n of n is n / (n + z²); of dense answers the interval is one over whole images.
    """
    limit = min(gate[1], 1 - 1e-9)
    looked_at = MIN_IMAGES
    if not contract.is_dense:
        looked_at = max(1, math.ceil(Z_95 * Z_95 * limit / (1 - limit)))
        while wilson_interval(looked_at, looked_at)[0] < limit:
            looked_at += 1
    return math.ceil(looked_at / share)
