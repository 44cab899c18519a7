"""Measure a search in an object store that answers each write late, against the same store without the delay.

A proxy of this process stands between the search and the store; it holds back the answers to PUT, POST and DELETE.
Trials report figures after epochs that are asleep. Prints a table.
"""

import contextlib
import http.client
import re
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fashion import cli
from fashion.bench.measurement import alternate
from fashion.bench.scale import growth, reporting
from fashion.bench.scale.reporter import Reporter
from fashion.cluster import connection
from fashion.config import require
from fashion.search.space import SearchConfig
from fashion.storage import open_storage

WRITES = ("PUT", "POST", "DELETE")
HOP_HEADERS = ("connection", "keep-alive", "transfer-encoding", "expect", "content-length")
"""Headers that the proxy sets itself."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `fashion.bench.scale.slow_store`."""

    storage: str = ""
    """URI of an S3 store that names its server: `s3://BUCKET?endpoint_override=HOST:PORT&scheme=http&region=...`."""
    delay_ms: float = 500.0
    """By how much each answer to a write is late."""
    trials: int = 64
    """Trials of the search."""
    epochs: int = 3
    """Most epochs of a trial."""
    epoch_s: float = 2.0
    """Time that an epoch takes, in seconds."""
    concurrent: int = 8
    """Trials at a time, each in a process."""
    repeats: int = 3
    """How often each side is timed, in turns, after a first time that warms up."""


def main(argv: Sequence[str]) -> None:
    """Run the search through the proxy, without the delay and with it; print the median times and ratio."""
    flags = cli.parse(Flags, argv, prog="python -m fashion.bench.scale.slow_store", description=__doc__ or "")
    found = re.search(r"endpoint_override=([^&]+)", flags.storage)
    require(found is not None, f"--storage {flags.storage!r} must be an S3 URI with endpoint_override=HOST:PORT")
    assert found is not None
    connection.connect(num_cpus=flags.concurrent)

    def rate(delay_ms: float) -> float:
        with proxy(found.group(1), delay_ms / 1000) as address:
            return 1 / run(flags.storage.replace(found.group(0), f"endpoint_override={address}"), flags)

    rates = alternate({"quick": lambda _: rate(0.0), "slow": lambda _: rate(flags.delay_ms)}, flags.repeats)
    ratios = [quick / slow for quick, slow in zip(rates["quick"], rates["slow"], strict=True)]
    reporting.print_table(
        [
            {
                "trials": flags.trials,
                "delay, ms": flags.delay_ms,
                "s without": 1 / statistics.median(rates["quick"]),
                "s with": 1 / statistics.median(rates["slow"]),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "greatest": max(ratios),
                "n": flags.repeats,
            }
        ]
    )


def run(uri: str, flags: Flags) -> float:
    """Return the time of the search in the store at `uri`, in seconds."""
    config = SearchConfig(num_samples=flags.trials, max_epochs=flags.epochs)
    with reporting.scratch(open_storage(uri)) as place, growth.unseen():
        reporter = Reporter(place.uri, "slow", flags.epochs, flags.epoch_s)
        trainable = reporting.trainable(reporter)
        return reporting.run_search(place, "slow", config, trainable, limit=lambda _: flags.concurrent).seconds


@contextlib.contextmanager
def proxy(server: str, delay_s: float) -> Iterator[str]:
    """Forward HTTP requests to `server` (HOST:PORT), the answers to writes later by `delay_s`; give the own address."""

    class Forward(BaseHTTPRequestHandler):
        """Forwards the requests of one connection."""

        protocol_version = "HTTP/1.1"

        def read_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()  # ends a chunk
            while self.rfile.readline().strip():  # what follows the last chunk, up to an empty line
                pass
            return body

        def forward(self) -> None:
            body = self.read_body()
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
            upstream = http.client.HTTPConnection(server)
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
            if self.command in WRITES:
                time.sleep(delay_s)
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_HEADERS:
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(content)
            upstream.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of each request."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Forward)
    listener.daemon_threads = True
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.server_address[1]}"
    finally:
        listener.shutdown()
        listener.server_close()


if __name__ == "__main__":
    cli.run(main)
