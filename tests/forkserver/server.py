"""Forks processes that have imported already what Ray's workers and the project's commands import; see
`site/sitecustomize.py`, which asks for them. `python server.py FOLDER` ends when its standard input does.

Ray itself is not among it: its library reads the environment when it is loaded, and each worker has its own.
"""

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import random
import resource
import runpy
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

LIBRARIES = (
    *("numpy", "pandas", "pyarrow", "pyarrow.compute", "pyarrow.dataset", "pyarrow.fs", "pyarrow.parquet"),
    *("torch", "torch._dynamo", "torch.distributed", "torch.distributed.fsdp", "torch.nn.parallel", "torch.utils.data"),
    *("torchvision", "safetensors.torch"),
    *("aiohttp.web", "click", "filelock", "fsspec", "google.protobuf", "grpc.aio", "jsonschema", "msgpack"),
    *("opentelemetry", "packaging.version", "prometheus_client", "psutil", "pydantic", "requests", "rich.console", "yaml"),
)
# Where one of these differs, a library might have done something else when it was imported.
READ_AT_IMPORT = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_", "TORCH", "PYTORCH_", "CUDA_")
READ_AT_START = ("LD_", "MALLOC_", "GLIBC_", "LANG", "LC_", "PYTHON", "ARROW_")
# These are followed in the child.
OF_EACH_PROCESS = ("PYTHONPATH", "PYTHONUNBUFFERED", "MALLOC_ARENA_MAX")
M_ARENA_MAX = -8  # malloc.h
# Namespaces that a child enters, and their flags for setns(2). It is born in that of its number, so this one comes first.
NAMESPACES = {"pid": 0x20000000, "net": 0x40000000, "uts": 0x04000000, "ipc": 0x08000000, "mnt": 0x00020000}
Request = dict[str, Any]


def constants(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that must be the same in the server and in what it forks."""
    beginnings = READ_AT_IMPORT + READ_AT_START
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(beginnings) and name not in OF_EACH_PROCESS
    }


def namespace(process: int | str, kind: str) -> tuple[int, int]:
    """Return what identifies a namespace of a process."""
    found = os.stat(f"/proc/{process}/ns/{kind}")
    return found.st_dev, found.st_ino


def enter(process: int | str, kind: str) -> None:
    """Enter a namespace of a process; for `pid`, what is forked from then on does."""
    file = os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY)
    assert ctypes.CDLL(None, use_errno=True).setns(file, NAMESPACES[kind]) == 0, os.strerror(ctypes.get_errno())
    os.close(file)


class Server:
    """Forks children, tells their proxies how they end, and ends them when their proxies are killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen(128)
        self.selector = selectors.DefaultSelector()
        self.proxies: dict[socket.socket, tuple[int, Path]] = {}
        self.constants = constants(dict(os.environ))
        self.woken, self.waker = os.pipe()
        for end in (self.woken, self.waker):
            os.set_blocking(end, False)

    def serve(self) -> tuple[Request, list[int], int] | None:
        """Answer until standard input ends, and return None then; in a child, return what it has to run: the request,
        its files and the proxy's process number.
        """
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker)
        for source in (self.listener, self.woken, 0):
            self.selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    for pid, _ in self.proxies.values():
                        os.kill(pid, signal.SIGKILL)
                    return None
                if key.fileobj is self.listener:
                    if (job := self.accept()) is not None:
                        return job
                elif key.fileobj == self.woken:
                    self.reap()
                elif key.fileobj in self.proxies:
                    self.pass_signal(key.fileobj)

    def accept(self) -> tuple[Request, list[int], int] | None:
        """Take a request; return it in the child that is to run it."""
        connection, _ = self.listener.accept()
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        request, files = receive(connection)
        fits = (request["prefix"], uid) == (sys.prefix, os.getuid())
        if fits and constants(request["environment"]) == self.constants:
            if (child := self.fork(pid)) == 0:
                self.forget()
                connection.close()
                return request, files, pid
            link = self.folder / str(pid)
            link.write_text(str(child))
            self.proxies[connection] = child, link
            self.selector.register(connection, selectors.EVENT_READ)
            connection.sendall(b"y")
        else:
            connection.sendall(b"n")
            connection.close()
        for file in files:
            os.close(file)
        return None

    def fork(self, proxy: int) -> int:
        """Fork a child that has its number where the proxy has its own."""
        elsewhere = namespace(proxy, "pid") != namespace("self", "pid")
        if elsewhere:
            enter(proxy, "pid")
        child = os.fork()
        if elsewhere and child != 0:
            enter("self", "pid")
        return child

    def forget(self) -> None:
        """In a child: leave what is the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for connection in (self.listener, *self.proxies):
            connection.close()
        for end in (self.woken, self.waker):
            os.close(end)

    def reap(self) -> None:
        """Tell proxies whose children have ended how they did."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.woken, 4096)
        for connection, (pid, link) in list(self.proxies.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found == 0:
                continue
            with contextlib.suppress(OSError):  # the proxy was killed
                connection.sendall(status.to_bytes(4, "big"))
            with contextlib.suppress(KeyError):
                self.selector.unregister(connection)
            link.unlink()
            connection.close()
            del self.proxies[connection]

    def pass_signal(self, connection: Any) -> None:
        """Pass a signal on; a proxy that is gone was killed."""
        pid, _ = self.proxies[connection]
        try:
            numbers = connection.recv(1)
        except ConnectionError:
            numbers = b""
        if not numbers:
            self.selector.unregister(connection)
        os.kill(pid, numbers[0] if numbers else signal.SIGKILL)


def receive(connection: socket.socket) -> tuple[Request, list[int]]:
    """Return a request and the files that come with it: standard input, output and error, and the working folder."""
    size, sent, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(16))
    files = array.array("i", b"".join(content for _, _, content in sent))
    body = b""
    while len(body) < int.from_bytes(size, "big"):
        body += connection.recv(1 << 16)
    return json.loads(body), list(files)


def become(request: Request, files: list[int], proxy: int) -> None:
    """Make this process like its proxy."""
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    os.setsid()
    for kind in ("net", "uts", "ipc", "mnt"):
        if namespace(proxy, kind) != namespace("self", kind):
            enter(proxy, kind)
    os.fchdir(files[3])
    for file in files:
        os.close(file)
    os.umask(request["umask"])
    os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    os.sched_setaffinity(0, request["cores"])
    for kind, soft, hard in request["limits"]:
        resource.setrlimit(kind, (soft, hard))
    for name in os.environ.keys() - request["environment"].keys():
        del os.environ[name]
    os.environ.update(request["environment"])
    if arenas := os.environ.get("MALLOC_ARENA_MAX"):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, int(arenas))
    random.seed()
    sys.modules["numpy"].random.seed()
    through = "-u" in request["words"] or "PYTHONUNBUFFERED" in os.environ
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        now = io.TextIOWrapper(
            open(number, "wb", closefd=False),
            encoding=before.encoding,
            errors=before.errors,
            line_buffering=number == 2 or os.isatty(number),
            write_through=through,
        )
        setattr(sys, name, now)
        setattr(sys, f"__{name}__", now)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)


def run(words: list[str], libraries: list[str]) -> None:
    """Run a command line of Python's."""
    sys.orig_argv = words
    words = [word for word in words[1:] if word != "-u"]
    is_module = words[0] == "-m"
    first = os.getcwd() if is_module else os.path.dirname(words[0])
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *named, *libraries]
    sys.argv = words[1:] if is_module else words
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]))
    own = {"", str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    libraries = [path for path in sys.path if path not in own]
    gc.disable()
    for library in LIBRARIES:
        importlib.import_module(library)
    assert "ray" not in sys.modules
    # What lives now lives on: no collection looks at it, so that the children share its memory.
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
    job = server.serve()
    if job is not None:
        gc.enable()
        become(*job)
        run(job[0]["words"], libraries)
