"""Check that the package ``exporters`` is dfadc's own, not a folder of the same name."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from dfadc.errors import RequirementMissing


def check_exporters_package() -> None:
    """Compares the location of ``exporters`` with that of ``dfadc``: the two are installed side by side.

    ``python -m dfadc`` and PYTHONPATH put other folders before the installed packages. The package is imported as well,
    so that a folder that is added to ``sys.path`` later, for a user's factory, cannot replace it.

    Raises:
        RequirementMissing: ``exporters`` is another package, or missing.
    """
    own = Path(__file__).parent.parent / "exporters"
    if (foreign := _foreign_package(own)) is not None:
        raise RequirementMissing(
            f"{foreign} hides the package exporters that belongs to dfadc ({own}): rename it, or run from a directory "
            "and with a PYTHONPATH that do not hold it"
        )
    try:
        import_module("exporters")
    except ImportError as exc:
        raise RequirementMissing(f"the package {own} is missing", "install dfadc again") from exc


def _foreign_package(own: Path) -> Path | None:
    """Folder or file of another package called ``exporters``, found without running it; None if there is none."""
    try:
        spec = find_spec("exporters")
    except ValueError:  # a module without a spec, which a program put into sys.modules
        return Path("<sys.modules>")
    if spec is None:
        return None
    locations = [Path(location) for location in spec.submodule_search_locations or (spec.origin or "",)]
    return None if own.resolve() in [location.resolve() for location in locations] else locations[0]
