"""Python reads this when it starts. The tests have it on PYTHONPATH, so that Ray's processes are forked from
`forkserver/server.py`, which has imported torch and the rest already: that import is most of what a small test would
otherwise do. So are the project's commands.

The process that was started stays as a proxy: it passes signals on, ends as the forked one ends, and takes it along
when it is killed.
"""

import os
import sys

FOLDER = "FASHION_TESTS_FORKSERVER"


SCRIPTS = ("/default_worker.py", "/agent.py", "/agent/main.py", "/dashboard.py", "/log_monitor.py", "/monitor.py")


def wants_fork(words: list[str]) -> bool:
    """Say whether this is one of Ray's workers, agents and monitors, its dashboard, or a module of the project."""
    words = [word for word in words if word != "-u"]
    is_module = words[:1] == ["-m"] and words[1].startswith(("jobs.", "fashion."))
    return is_module or any("/ray/" in script and script.endswith(SCRIPTS) for script in words[:1])


def run_elsewhere(folder: str) -> None:
    """Have the server run this command, and end as it ends; returns if there is no server for it."""
    import array
    import json
    import resource
    import signal
    import socket

    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(os.path.join(folder, "socket"))
    except OSError:
        return
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "words": sys.orig_argv,
        "prefix": sys.prefix,
        "environment": dict(os.environ),
        "umask": umask,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "cores": sorted(os.sched_getaffinity(0)),
        "limits": [[kind, *resource.getrlimit(kind)] for kind in range(resource.RLIMIT_AS + 1)],
    }
    body = json.dumps(request).encode()
    files = array.array("i", [0, 1, 2, os.open(".", os.O_RDONLY)])
    server.sendmsg([len(body).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    server.sendall(body)
    passed = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, lambda number, _: server.sendall(bytes([number]))) for number in passed}
    if server.recv(1) != b"y":
        for number, handler in before.items():
            signal.signal(number, handler)
        server.close()
        os.close(files[3])
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):
        os.dup2(nowhere, file)
    status = int.from_bytes(server.recv(4), "big")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


if FOLDER in os.environ and wants_fork(sys.orig_argv[1:]):
    run_elsewhere(os.environ[FOLDER])
