"""Start the fork server, and run a command with it: `python tests/forkserver/run.py COMMAND ...`.

What its processes have imported they share, so a simulated cluster of a hundred processes fits into one machine.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = "FASHION_TESTS_FORKSERVER"
"""Environment variable with the folder of the server's socket."""
START_TIMEOUT_S = 60.0
HERE = Path(__file__).parent


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Have all that is started meanwhile forked by a server, which then ends, and with it what it has forked."""
    with tempfile.TemporaryDirectory(prefix="forkserver-") as folder:
        server = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), folder], stdin=subprocess.PIPE, start_new_session=True
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not os.path.exists(f"{folder}/socket") and server.poll() is None:
            assert time.monotonic() < deadline, f"no fork server in {START_TIMEOUT_S:.0f} s"
            time.sleep(0.1)
        os.environ[FOLDER] = folder
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE / "site"), os.environ.get("PYTHONPATH")]))
        try:
            yield
        finally:
            server.communicate()
        assert server.returncode == 0, server.returncode


if __name__ == "__main__":
    with forking():
        sys.exit(subprocess.call(sys.argv[1:]))
