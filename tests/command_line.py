"""Running dfadc's commands as a person does: in this process where that is enough, else in one of their own."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from processes import ForkedProcess, NewProcess

from dfadc.cli.main import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parents[1]
#: Of ``dfadc.training.stock``, in this process and in those of commands that begin a run.
FEW_IMAGES = {"MOST_IMAGES": 256, "MOST_FLOPS": 4e9}
_ON_FEW_IMAGES = f"from dfadc.training import stock; vars(stock).update({FEW_IMAGES})"


class Outcome(NamedTuple):
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what went wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    @property
    def hints(self) -> list[str]:
        """The lines that say how to fix it."""
        return [line for line in self.err.splitlines() if line.startswith("hint:")]


def run_command(*arguments: object) -> Outcome:
    """Runs a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def run_script(script: Path, *arguments: object) -> Outcome:
    """Runs a script in this process, as ``python SCRIPT ...`` would; what it imported from beside it is forgotten."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, path, modules, threads = sys.argv, sys.path[:], set(sys.modules), torch.get_num_threads()
    sys.argv, sys.path = [str(script), *map(str, arguments)], [str(script.parent), *path]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), torch.random.fork_rng(devices=[]):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        err.write(end.code if isinstance(end.code, str) else "")
    finally:
        sys.argv, sys.path = argv, path
        torch.set_num_threads(threads)
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(f"{script.parent}{os.sep}"):
                del sys.modules[name]
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def command_process(
    *arguments: object, preamble: str = "", imports_done: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, which ends with the block at the latest.

    Args:
        arguments: of the command.
        preamble: Python that the process runs first.
        imports_done: torch and its like are there from the beginning, which saves seconds.
    """
    first = _ON_FEW_IMAGES if arguments[:1] == ("distill",) else ""
    program = f"import sys\n{preamble}\n{first}\nfrom dfadc.cli.main import main\nmain()"
    command, environment = [program, *map(str, arguments)], {**os.environ, "PYTHONPATH": str(ROOT)}
    start = ForkedProcess if imports_done else NewProcess
    with start(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run_python(program: str, *arguments: object) -> Outcome:
    """Runs a program to its end, in a process of its own whose imports of torch and its like are done."""
    command, environment = [program, *map(str, arguments)], {**os.environ, "PYTHONPATH": str(ROOT)}
    with ForkedProcess(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        return finish_command(process)


def finish_command(process: subprocess.Popen[str], *, already_read: str = "") -> Outcome:
    """Waits for a process; ``already_read`` is what somebody read of its stderr before."""
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, already_read + err)


@contextlib.contextmanager
def disk_that_holds(num_bytes: int) -> Iterator[None]:
    """No file of this process may become larger; to a program that is a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def settings(overrides: Mapping[str, Any]) -> list[str]:
    """Recipe fields as the flags that set them."""
    return [word for path, value in overrides.items() for word in ("--set", f"{path}={value}")]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
