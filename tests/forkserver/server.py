"""Forks processes that have imported already what Ray's processes import; see `site/sitecustomize.py`, which asks for
them. `python server.py FOLDER` ends when its standard input does.

The process that is started stays as a proxy of the forked one. `FOLDER/PID`, named after the proxy, holds the number of
the server's child, which is the forked process or, for a host of its own, ends with it.

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
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    *("numpy", "pandas", "pyarrow", "pyarrow.compute", "pyarrow.dataset", "pyarrow.fs", "pyarrow.parquet"),
    *("torch", "torch._dynamo", "torch.distributed", "torch.distributed.fsdp", "torch.nn.parallel", "torch.utils.data"),
    *("torchvision", "safetensors.torch", "scipy.stats", "optuna"),
    *("aiohttp.web", "click", "fastapi", "filelock", "fsspec", "google.protobuf", "grpc.aio", "jinja2", "jsonschema"),
    *("msgpack", "opentelemetry.sdk.metrics", "packaging.version", "prometheus_client", "psutil", "pydantic"),
    *("requests", "rich.progress", "tyro", "yaml"),
)
# Where one of these differs, a library might have done something else when it was imported.
READ_AT_IMPORT = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_", "TORCH_", "CUDA_")
READ_AT_START = ("LD_", "MALLOC_", "GLIBC_", "LANG", "LC_", "PYTHON", "ARROW_")
# These are followed in the child; `ray.init` sets the last one, which `breakpoint` reads when it is called.
OF_EACH_PROCESS = ("PYTHONPATH", "PYTHONUNBUFFERED", "MALLOC_ARENA_MAX", "PYTHONBREAKPOINT")
M_ARENA_MAX = -8  # malloc.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
NAMESPACES = ("ipc", "uts", "net", "pid", "mnt")
# Ray preloads it into its dashboard and monitors, to which it makes no difference in a test.
RAYS_MALLOC = "/ray/core/libjemalloc.so"
Request = dict[str, Any]
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def constants(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that must be the same in the server and in what it forks."""
    beginnings = READ_AT_IMPORT + READ_AT_START
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(beginnings) and name not in OF_EACH_PROCESS and not value.endswith(RAYS_MALLOC)
    }


class Server:
    """Forks children, tells their proxies how they end, and ends them when their proxies are killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen(128)
        self.selector = selectors.DefaultSelector()
        self.proxies: dict[socket.socket, int] = {}
        self.constants = constants(dict(os.environ))
        self.woken, self.waker = os.pipe()
        for end in (self.woken, self.waker):
            os.set_blocking(end, False)

    def serve(self) -> tuple[Request, list[int]] | None:
        """Answer until standard input ends, and return None then; in a child, return what it has to run: the request
        and its files.
        """
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker)
        for source in (self.listener, self.woken, 0):
            self.selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    for pid in self.proxies.values():
                        os.kill(pid, signal.SIGKILL)
                    return None
                if key.fileobj is self.listener:
                    if (job := self.accept()) is not None:
                        return job
                elif key.fileobj == self.woken:
                    self.reap()
                elif key.fileobj in self.proxies:
                    self.pass_signal(key.fileobj)

    def accept(self) -> tuple[Request, list[int]] | None:
        """Take a request; return it in the child that is to run it."""
        connection, _ = self.listener.accept()
        try:
            request, files = receive(connection)
        except ValueError:  # it was killed while it asked
            connection.close()
            return None
        if request["prefix"] == sys.prefix and constants(request["environment"]) == self.constants:
            child = self.fork(connection)
            if child == 0:
                connection.close()
                return request, files
            self.proxies[connection] = child
            self.selector.register(connection, selectors.EVENT_READ)
            connection.sendall(b"y")
        else:
            connection.sendall(b"n")
            connection.close()
        for file in files:
            os.close(file)
        return None

    def fork(self, connection: socket.socket) -> int:
        """Return 0 in a process where the proxy is, and in the server the number of its child, which is that process
        or, for a host of its own, one that ends with it.
        """
        proxy = peer(connection)
        if child := os.fork():
            path = self.folder / str(proxy)
            path.with_suffix(".new").write_text(str(child))
            path.with_suffix(".new").rename(path)
            return child
        self.forget()
        if enter_namespaces(proxy):
            child = os.fork()
            if child:
                stand_for(child)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return 0

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
        for connection, pid in list(self.proxies.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found == 0:
                continue
            (self.folder / str(peer(connection))).unlink()
            with contextlib.suppress(OSError):  # the proxy was killed
                connection.sendall(status.to_bytes(4, "big"))
            with contextlib.suppress(KeyError):
                self.selector.unregister(connection)
            connection.close()
            del self.proxies[connection]

    def pass_signal(self, connection: Any) -> None:
        """Pass a signal on; a proxy that is gone was killed."""
        pid = self.proxies[connection]
        try:
            numbers = connection.recv(1)
        except ConnectionError:
            numbers = b""
        if not numbers:
            self.selector.unregister(connection)
        os.kill(pid, numbers[0] if numbers else signal.SIGKILL)


def peer(connection: socket.socket) -> int:
    """Return the number of the process at the other end."""
    return int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def enter_namespaces(process: int) -> bool:
    """Enter the namespaces of another process; return whether its processes are numbered by themselves: then what this
    one forks is among them, and this one is not.
    """
    others = [
        name for name in NAMESPACES if os.readlink(f"/proc/{process}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
    ]
    for file in [os.open(f"/proc/{process}/ns/{name}", os.O_RDONLY) for name in others]:
        if ctypes.CDLL(None, use_errno=True).setns(file, 0):
            raise OSError(ctypes.get_errno(), f"setns into {others} of {process}")
        os.close(file)
    return "pid" in others


def stand_for(child: int) -> NoReturn:
    """Pass signals on to `child`, and end as it ends."""
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if (number := os.WTERMSIG(status)) != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def receive(connection: socket.socket) -> tuple[Request, list[int]]:
    """Return a request and the files that come with it: standard input, output and error, and the working folder.

    Raises `ValueError` if it is not complete.
    """
    size, sent, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(16))
    files = array.array("i", b"".join(content for _, _, content in sent))
    body = b""
    with contextlib.suppress(ConnectionError):
        while len(body) < int.from_bytes(size, "big") and (more := connection.recv(1 << 16)):
            body += more
    return json.loads(body), list(files)


def become(request: Request, files: list[int]) -> None:
    """Make this process like its proxy."""
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    os.setsid()
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
            open(number, "wb", buffering=0 if through else -1, closefd=False),  # noqa: SIM115  # it stays open
            encoding=before.encoding,
            errors=before.errors,
            line_buffering=number == 2 or os.isatty(number),
            write_through=through,
        )
        setattr(sys, name, now)
        setattr(sys, f"__{name}__", now)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115


def run(words: list[str], libraries: list[str]) -> NoReturn:
    """Run the script that a command line of Python's names, to the end of the process."""
    status: object = 0
    try:
        run_script(words, libraries)
    except SystemExit as end:
        status = end.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    # As Python ends, but for the objects: it would look at all that was imported, which takes longer than most tests.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status or 0)


def run_script(words: list[str], libraries: list[str]) -> None:
    """Run the script or the module that a command line of Python's names."""
    sys.orig_argv = words
    words = [word for word in words[1:] if word != "-u"]
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    is_module = words[0] == "-m"
    sys.path[:] = [os.getcwd() if is_module else os.path.dirname(words[0]), *named, *libraries]
    sys.argv = words[is_module:]
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
    job = server.serve()
    if job is None:
        os._exit(0)
    gc.enable()
    become(*job)
    run(job[0]["words"], libraries)
