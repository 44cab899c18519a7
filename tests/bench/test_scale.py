"""What measures a search at scale: searches that only report, kills, a proxy that is late, shares of time."""

import http.client
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.tune

from fashion.bench.scale import growth, kills, placement, reporting, slow_store
from fashion.bench.scale.reporter import Reporter, metrics_of
from fashion.reports import tables
from fashion.reports.page.content import Panel
from fashion.reports.page.drawing.matplotlib_png import figure_png
from fashion.search.space import SearchConfig
from fashion.search.trial_store import TrialStore, name_of
from fashion.storage import Storage

pytestmark = pytest.mark.ray

CONFIG = SearchConfig(num_samples=12, max_epochs=3)


class Trials(ray.tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Keeps Tune's trials that have ended."""

    def __init__(self) -> None:
        self.ended: list[Any] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ended.append(trial)


def test_a_search_that_only_reports_is_a_whole_search(ray_cluster: None, storage: Storage) -> None:
    trainable = reporting.trainable(Reporter(storage.uri, growth.SEARCH_ID, CONFIG.max_epochs))
    seen = Trials()
    done = reporting.run_search(storage, growth.SEARCH_ID, CONFIG, trainable, limit=lambda _: 2, others=[seen])
    assert [trial.metric_analysis or trial.metric_n_steps for trial in seen.ended] == [{}] * 12, "Tune sums up nothing"
    trials = done.store.trials.values()
    assert {trial.status for trial in trials} == {"completed", "stopped"}
    assert len(done.callback["on_trial_result"]) == sum(len(trial.history) for trial in trials)
    assert len(done.callback["on_trial_start"]) == len(done.callback["on_trial_complete"]) == 12
    assert 0 < done.ms_per_call("on_trial_result") < 1000 * done.seconds
    assert reporting.num_files(storage, "reports") == len(tables.SEARCH_TABLES)
    assert growth.resume_seconds(storage, CONFIG) > 0
    assert reporting.read_seconds(storage, "epochs") > 0
    flags = kills.Flags(trials=12, epochs=3)
    assert kills.is_whole(storage, growth.SEARCH_ID, flags)
    again = reporting.run_search(storage, growth.SEARCH_ID, CONFIG, trainable, limit=lambda _: 2)
    assert again.callback == {}, "nothing was left to run"


def test_tune_alone_keeps_nothing(ray_cluster: None, storage: Storage) -> None:
    config = replace(CONFIG, num_samples=2)
    with reporting.scratch(storage) as place:
        trainable = reporting.trainable(Reporter(place.uri, growth.SEARCH_ID, config.max_epochs))
        done = reporting.run_search(place, growth.SEARCH_ID, config, trainable, limit=lambda _: 2, keeps=False)
        assert done.store.trials == {}
        assert reporting.num_files(place, "searches") > 0
        assert reporting.num_files(place, "reports") == 0
    assert not list(Path(storage.root).iterdir())


@pytest.mark.parametrize("concurrent", [1, 2])
def test_searches_that_are_killed_and_resumed_end_as_they_must(
    ray_cluster: None, storage: Storage, concurrent: int
) -> None:
    flags = kills.Flags(kills=2, per_search=2, concurrent=concurrent, trials=8, epochs=3, epoch_s=0.3)
    row = kills.kill_all(storage, flags)
    # A second one begins where the first ended before it was hit as often.
    assert row["every trial a row, each epoch once"] == row["searches"] in (1, 2)
    if concurrent == 1:
        assert row["ended as the unbroken one"] == row["searches"]


def write_search(store: TrialStore, last: int, epochs: int) -> None:
    """Write a search whose trials completed three epochs each, the last one fewer or others."""
    with store:
        for number in range(3):
            settings = CONFIG.draw(number)
            store.start(name_of(number), settings)
            for epoch in range(1, (epochs if number == last else 3) + 1):
                point = {"trial": name_of(number)} | settings
                store.add_epoch(name_of(number), metrics_of(point, epoch), 1.0)
            store.end(name_of(number), "completed")


@pytest.mark.parametrize(("trials", "epochs", "is_whole"), [(3, 3, True), (4, 3, False), (3, 2, False)])
def test_a_search_that_lacks_something_is_not_whole(storage: Storage, trials: int, epochs: int, is_whole: bool) -> None:
    flags = kills.Flags(trials=trials, epochs=3)
    write_search(reporting.trial_store(storage, "s", flags.config()), 2, epochs)
    assert kills.is_whole(storage, "s", flags) is is_whole


def test_shares_of_time_count_what_lies_within() -> None:
    usage = placement.Usage(3, epochs=[(0.0, 10.0), (0.0, 5.0), (8.0, 20.0)])
    assert usage.share(usage.epochs, 0.0, 10.0, 2) == pytest.approx((10 + 5 + 2) / 20)
    assert usage.share(usage.epochs, 10.0, 20.0, 1) == 1.0


def test_a_lost_trial_was_in_an_epoch_until_its_node_was_lost() -> None:
    usage = placement.Usage(1)
    watcher, trial = placement.Watcher(usage, 20.0), SimpleNamespace(trial_id="a")
    watcher.on_trial_start(0, [], trial)
    began = usage.began["a"]
    assert usage.full_at == began
    usage.lost_at = began + 7.0
    watcher.on_trial_recover(1, [], trial)
    watcher.on_trial_start(1, [], trial)
    assert usage.taken == [(began, began + 7.0)]
    assert usage.epochs == [(began, began + 7.0)]
    assert placement.Flags(nodes=8).third == 3


# --- the proxy ------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that answers with the method, the path and the body of each request."""

    class Echo(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = f"{self.command} {self.path} ".encode() + body
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Told", self.headers.get("X-Asked", ""))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_proxy_holds_back_the_answers_to_writes_alone(echo: str) -> None:
    with slow_store.proxy(echo, 1.5) as address:
        for method, is_late in (("GET", False), ("PUT", True), ("HEAD", False), ("DELETE", True)):
            client = http.client.HTTPConnection(address)
            started = time.monotonic()
            client.request(method, "/a%20b?c=d", b"body" if method == "PUT" else None, {"X-Asked": "this"})
            answer = client.getresponse()
            content = answer.read().decode()
            assert (time.monotonic() - started >= 1.5) is is_late
            assert (answer.status, answer.getheader("X-Told")) == (200, "this")
            told = f"{method} /a%20b?c=d " + ("body" if method == "PUT" else "")
            assert content == ("" if method == "HEAD" else told)
            assert answer.getheader("Content-Length") == str(len(told))
            client.close()


def test_growth_is_drawn_with_a_line_per_store_and_side() -> None:
    rows = [
        {"store": store, "trials": trials, "ms per epoch": 0.2, "s": 2.0, "s alone": 1.9, "MB of the driver": 900.0}
        for store in ("folder", "object store")
        for trials in (100, 1000)
    ]
    figure = growth.growth_figure(rows)
    names = [[line.name for line in panel.series] for panel in figure.panels if isinstance(panel, Panel)]
    both = ["folder", "object store"]
    assert names == [both, ["folder", "alone, folder", "object store", "alone, object store"], both]
    assert figure_png(figure).startswith(b"\x89PNG")
