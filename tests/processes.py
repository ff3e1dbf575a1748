"""Processes of a program of ours: new ones, and ones that begin with their imports done.

To import torch and its like takes an interpreter three to six seconds of CPU. So there is one that has done it, and
forks. Apart from that a fork is what any process is: streams, signals, limits, memory and end are its own, and no
module of ours is imported in advance.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any

#: What commands import of others' packages.
FOREIGN = (
    *("torch", "torchvision", "torch.onnx", "torch.onnx._internal.exporter._core", "torch._dynamo", "onnxscript"),
    *("onnx", "numpy", "safetensors.torch", "PIL.Image", "matplotlib.figure", "jinja2", "pydantic"),
    *("typer", "rich.table", "rich.progress", "filelock", "tomli_w"),
)
#: Forks a process for each request. Its own parent ends at once, and so it becomes a child of who asked.
SERVER = """
import gc, importlib, json, os, signal, socket, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
requests = socket.socket(fileno=int(sys.argv[1]))
for name in sys.argv[2:]:
    importlib.import_module(name)
gc.collect()
gc.freeze()
while True:
    message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
    if not message:
        os._exit(0)
    told, telling = os.pipe()
    between = os.fork()
    if not between:
        pid = os.fork()
        if not pid:
            break
        os.write(telling, b"%d" % pid)
        os._exit(0)
    os.waitpid(between, 0)
    requests.send(os.read(told, 20))
    for descriptor in (told, telling, *descriptors):
        os.close(descriptor)
requests.close()
signal.signal(signal.SIGINT, signal.default_int_handler)
for place, descriptor in enumerate(descriptors):
    os.dup2(descriptor, place)
os.closerange(3, 1 + max(told, telling, *descriptors))
request = json.loads(message)
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["folder"])
sys.argv = ["-c", *request["arguments"]]
exec(compile(request["program"], "<string>", "exec"), {"__name__": "__main__"})
"""
#: Of Linux's prctl: orphans below this process become its children.
SET_CHILD_SUBREAPER = 36
_one_at_a_time = threading.Lock()


@functools.cache
def _server(imports: tuple[str, ...]) -> socket.socket:
    """The connection to a process that has imported these; that process ends with this one."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", SERVER, str(theirs.fileno()), *imports]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])  # noqa: S603 -- our own interpreter
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


class NewProcess(subprocess.Popen[str]):
    """``python -c PROGRAM ARGUMENTS``.

    Args:
        command: program and arguments.
        settings: of :class:`subprocess.Popen`.
    """

    def __init__(self, command: list[str], **settings: Any) -> None:
        super().__init__([sys.executable, "-c", *command], **settings)


class ForkedProcess(subprocess.Popen[Any]):
    """The same with imports done.

    Args:
        command: program and arguments.
        imports: modules that are imported already.
        settings: of :class:`subprocess.Popen`, of which ``cwd``, ``env``, ``text`` and the streams count.
    """

    def __init__(self, command: list[str], *, imports: tuple[str, ...] = FOREIGN, **settings: Any) -> None:
        self._imports = imports
        super().__init__(command, **settings)

    def _execute_child(self, args: list[str], *settings: Any) -> None:
        """Asks for a process where Popen would start one itself."""
        folder, environment = settings[4], settings[5]
        pipes = settings[9:15]  # each stream's two ends; -1 where it is inherited
        streams = [end if end != -1 else place for place, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        request = {
            "program": args[0],
            "arguments": args[1:],
            "folder": os.fspath(folder or os.getcwd()),  # noqa: PTH109 -- JSON has no paths
            "environment": dict(os.environ if environment is None else environment),
        }
        with _one_at_a_time:
            server = _server(self._imports)
            socket.send_fds(server, [json.dumps(request).encode()], streams)
            self.pid = int(server.recv(20))
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
