"""Check that the package ``exporters`` is the one that dfadc was installed with, not a folder of the same name."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from dfadc.errors import RequirementMissing


def check_exporters_package() -> None:
    """Compares the place of ``exporters`` with the place of ``dfadc``; the two are installed side by side.

    ``python -m dfadc`` and PYTHONPATH put other folders before the installed packages. The package is imported too, so
    that a folder that is added to ``sys.path`` later, for a user's factory, cannot replace it.

    Raises:
        RequirementMissing: ``exporters`` is another package, or missing.
    """
    own = Path(__file__).parent.parent / "exporters"
    foreign = _foreign_place(own)
    if foreign is not None:
        raise RequirementMissing(
            f"the name exporters belongs to dfadc ({own}), and Python finds another package of that name: {foreign}",
            f"rename {foreign}, or run from another directory; PYTHONPATH must not name its folder either",
        )
    try:
        import_module("exporters")
    except ImportError as exc:
        raise RequirementMissing(f"the package exporters is missing beside {own.with_name('dfadc')}", "install dfadc again") from exc


def _foreign_place(own: Path) -> Path | None:
    """Folder or file of another package called ``exporters``; None if there is none. Nothing of it is run."""
    try:
        spec = find_spec("exporters")
    except ValueError:  # an entry of sys.modules without a spec
        return Path("sys.modules")
    if spec is None:
        return None
    places = [Path(place) for place in spec.submodule_search_locations or ()] or [Path(spec.origin or "")]
    return None if own.resolve() in [place.resolve() for place in places] else places[0]
