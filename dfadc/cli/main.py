"""The `dfadc` command: its subcommands, and the conversion of errors to exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from dfadc._version import __version__
from dfadc.cli.baseline import baseline
from dfadc.cli.bench import bench
from dfadc.cli.ci import annotate_error
from dfadc.cli.distill import distill
from dfadc.cli.doctor import doctor
from dfadc.cli.export import export
from dfadc.cli.inspect import inspect
from dfadc.cli.recipe import recipe_app
from dfadc.cli.report import report
from dfadc.cli.script import print_error
from dfadc.cli.streams import keeping_stdout_for_results, take_over_streams
from dfadc.cli.students import students
from dfadc.cli.verify import verify
from dfadc.errors import DfadcError, Interrupted, ReaderGone, StorageFailed, ending_signals
from dfadc.package_check import check_exporters_package
from dfadc.storage import FULL

#: System errors of a full or read-only disk.
_STORAGE = (*FULL, errno.EROFS)

app = typer.Typer(
    name="dfadc",
    help="Compile a trained image network into a small one for an edge device, without one image of training data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (distill, export, verify, baseline, inspect, students, report, bench, doctor):
    app.command()(keeping_stdout_for_results(command))
app.add_typer(recipe_app, name="recipe")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dfadc {__version__}", file=sys.stdout)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `dfadc` itself."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; errors are printed on stderr."""
    try:
        try:
            check_exporters_package()
            app(args=list(arguments), prog_name="dfadc")
        except OSError as exc:  # such as that of temporary files
            if exc.errno not in _STORAGE:
                raise
            raise StorageFailed(f"cannot write {exc.filename or 'a file'}: {exc.strerror}", "free some space") from exc
    except ReaderGone as exc:
        return exc.exit_code
    except DfadcError as exc:
        print_error(exc)
        annotate_error(exc)
        return exc.exit_code
    except SystemExit as exc:
        if exc.code == Interrupted.exit_code:  # of a KeyboardInterrupt; a training ends in an error of its own
            _print_interrupted()
        return exc.code if isinstance(exc.code, int) else 1
    except ImportError as exc:
        # A signal while a library's native part is imported: the import fails, for the reason of the signal.
        if not isinstance(exc.__cause__, KeyboardInterrupt):
            raise
        _print_interrupted()
        return Interrupted.exit_code
    return 0


def _print_interrupted() -> None:
    print_error(Interrupted("interrupted", "every file is whole or as it was: give the command again"))


def _end_like_ctrl_c(signum: int, frame: FrameType | None) -> None:
    """Ends a command on SIGTERM and SIGHUP as on Ctrl-C, with whole files; a second signal ends it at once."""
    signal.signal(signum, signal.SIG_DFL)
    sys.unraisablehook = lambda _: None  # what a destructor of a file cut off in its constructor says is no news
    signal.default_int_handler(signum, frame)


def main() -> None:
    """Entry point of the console script."""
    # torch reads it at its first allocation: large tensors then take pages of 2 MiB, and fault once for each.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    take_over_streams()
    for signum in ending_signals():
        signal.signal(signum, _end_like_ctrl_c)
    sys.exit(run(sys.argv[1:]))
