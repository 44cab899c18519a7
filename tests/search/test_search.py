"""Searches on Ray Tune: poor trials stop early, bad ones become rows, and a killed search goes on as if nothing was."""

import contextlib
import errno
import functools
import importlib.metadata
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import drivers
import pytest
import ray
import torch
from conftest import ROOT

from fashion.config import TrainConfig, UserError
from fashion.data import preparation, synthetic
from fashion.data.manifest import load_manifest
from fashion.distributed import trainer
from fashion.reports import tables, tracking
from fashion.reports.runs import load_run, stored_config
from fashion.search import callbacks, search, stored_settings, trial
from fashion.search.plan import search_plan_for
from fashion.search.sampler import build_sampler, pending_points
from fashion.search.scheduler import ASHA, TRIAL, TrialKey, replay_scheduler
from fashion.search.space import SearchConfig, SearchScale
from fashion.search.trial_store import CHECKPOINTS, Trial, TrialStore, name_of
from fashion.storage import Storage, open_storage

pytestmark = pytest.mark.ray

ONE_AT_A_TIME = SearchScale(max_concurrent=1, checkpoint_every_s=0)
BASE = TrainConfig(preset="smoke", max_train_rows=448, global_batch_size=32, precision="fp32")
# What no run takes, what crashes, what diverges; then a good trial, a poor one, and one that is drawn. After one
# epoch the accuracy of the good one is above 0.5 and that of the poor one 0.1, in fp32 and in bf16: no decision hangs
# on rounding.
PLANTED = (
    '{"lr": NaN}',
    '{"padding": "none"}',
    '{"lr": 100.0, "dropout_conv": 0.0}',
    '{"lr": 0.001, "dropout_conv": 0.0, "dropout_fc": 0.0, "padding": "zeros"}',
    '{"lr": 0.03, "dropout_conv": 0.5}',
)
CONFIG = SearchConfig(num_samples=6, max_epochs=3, padding=("zeros", "partial"), first=PLANTED)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A small stand-in, so that the refit on all rows is quick."""
    storage = open_storage(str(tmp_path_factory.mktemp("search")))
    with pytest.MonkeyPatch.context() as patch:
        small = functools.partial(synthetic.write_archives, num_train_rows=600, num_test_rows=300)
        patch.setattr(synthetic, "write_archives", small)
        preparation.prepare(storage, "synthetic", val_rows=101)
    return storage


@pytest.fixture(scope="module", autouse=True)
def mlflow_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str] | None]:
    """A real tracking server over SQLite, in an environment of its own, and its address: it starts beside the tests."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    version = importlib.metadata.version("mlflow-skinny")
    environment = [uv, "run", "--no-project", "--isolated", "--python", sys.executable, "--with", f"mlflow=={version}"]
    command = [*environment, "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        [*command, "--backend-store-uri", f"sqlite:///{folder}/store.db", "--default-artifact-root", str(folder)],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield server, f"http://127.0.0.1:{port}"
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
    server.wait(timeout=300)


def free_port() -> int:
    """Return a port that nobody takes until the server is up: not of the range that Ray's processes draw from."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@pytest.fixture(scope="module")
def mlflow_server(mlflow_process: tuple[subprocess.Popen[bytes], str] | None) -> str:
    """The address of the tracking server, as soon as it answers; empty where none can be had."""
    if mlflow_process is None:
        return ""
    server, uri = mlflow_process
    deadline = time.monotonic() + 600
    while server.poll() is None and time.monotonic() < deadline and not answers(uri):
        time.sleep(0.2)
    return uri if server.poll() is None and answers(uri) else ""


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def outcomes(storage: Storage, search_id: str, config: SearchConfig = CONFIG) -> list[tuple[Any, ...]]:
    """Return what became of each trial, by trial: status, epochs, and the exact accuracies of every epoch."""
    found = []
    for number in range(config.num_samples):
        run_id = f"{search_id}-{name_of(number)}"
        [row] = tables.read_table(storage, "trials", run_id)
        epochs = [each for each in tables.read_table(storage, "epochs", run_id) if each["split"] == "val"]
        found.append((row["trial_id"], row["status"], row["epochs_done"], [each["accuracy"] for each in epochs]))
    return found


def test_trials_with_several_workers_do_not_wait_on_each_other(ray_cluster: None, prepared: Storage) -> None:
    """Each trial takes both CPUs; the second one starts when the first is done, and is stopped in mid-run."""
    first = ('{"lr": 0.001, "dropout_conv": 0.0, "dropout_fc": 0.0}', '{"lr": 0.03, "dropout_conv": 0.5}')
    config = SearchConfig(num_samples=2, max_epochs=2, reduction_factor=2, workers_per_trial=2, first=first)
    search.search(prepared, "wide", config, BASE, SearchScale(), options=search.SearchOptions(source="synthetic"))
    found = outcomes(prepared, "wide", config)
    assert [(status, epochs) for _, status, epochs, _ in found] == [("completed", 2), ("stopped", 1)]
    assert load_run(prepared, "wide-t0000")["world_size"] == 2


@pytest.fixture(scope="module")
def unbroken(ray_cluster: None, prepared: Storage, mlflow_server: str) -> search.SearchResult:
    """A search that nobody interrupts, with a refit; an MLflow server hears of it where there is one."""
    return search.search(
        prepared,
        "unbroken",
        CONFIG,
        BASE,
        ONE_AT_A_TIME,
        options=search.SearchOptions(source="synthetic", refit=True, mlflow=mlflow_server),
    )


def test_bad_trials_are_rows_and_the_search_goes_on(unbroken: search.SearchResult, prepared: Storage) -> None:
    rows = [tables.read_table(prepared, "trials", f"unbroken-{name_of(number)}")[0] for number in range(6)]
    assert [row["status"] for row in rows[:4]] == ["error", "error", "diverged", "completed"]
    assert rows[0]["error"] == "--lr nan must be a finite number above 0 and at most 100"
    assert rows[1]["error"].startswith("--padding 'none' must be of type Literal['zeros', 'replicate', 'reflect', ")
    assert "loss is not finite" in rows[2]["error"]
    assert rows[4]["status"] == "stopped"
    assert rows[4]["epochs_done"] == rows[4]["rung"] == 1
    assert {row["status"] for row in rows[5:]} <= {"completed", "stopped"}
    runs = [load_run(prepared, f"unbroken-{row['trial_id']}") for row in rows]
    assert [run["kind"] for run in runs] == ["trial"] * 6
    assert all(run["test_accuracy"] is None for run in runs), "trials never read test"
    assert [run["status"] for run in runs[:4]] == ["failed", "failed", "diverged", "completed"]


def test_asha_spares_epochs_and_the_best_comes_first(unbroken: search.SearchResult) -> None:
    sound = [trial for trial in unbroken.trials if trial.status in ("completed", "stopped")]
    assert sum(len(trial.history) for trial in sound) < 3 * len(sound)
    accuracies = [trial.best["val_accuracy"] for trial in sound if trial.best]
    assert accuracies == sorted(accuracies, reverse=True)
    assert sound == unbroken.trials[: len(sound)], "failed ones come last, whatever they reached"


def test_what_the_search_found_is_a_table(unbroken: search.SearchResult, prepared: Storage) -> None:
    rows = tables.read_table(prepared, "importance", "unbroken")
    assert [row["setting"] for row in rows] == [row["setting"] for row in unbroken.findings] == CONFIG.searched()
    assert {row["note"] for row in rows} == {"3 of 6 trials have a result; 8 are needed"}
    assert {row["winner"] for row in rows if row["setting"] == "lr"} == {unbroken.trials[0].settings["lr"]}
    assert (rows[0]["trials"], rows[0]["diverged_trials"]) == (4, 1), "crashed ones are left out"


def test_nothing_but_reports_and_curves_stays_of_a_trial(unbroken: search.SearchResult, prepared: Storage) -> None:
    folder = Path(prepared.path("searches", "unbroken"))
    assert not list(folder.rglob("*.safetensors"))
    assert not list(folder.rglob("optimizer.pt"))
    values = drivers.curves_of(folder / "t0003")
    rows = tables.read_table(prepared, "epochs", "unbroken-t0003")
    assert [values[f"{row['split']}_loss", row["epoch"]] for row in rows] == pytest.approx(
        [row["loss"] for row in rows]
    )
    assert ("_hparams_/session_start_info", 0) in values, "its settings"


def test_the_winner_is_refitted_on_all_rows_and_read_once_on_test(
    unbroken: search.SearchResult, prepared: Storage
) -> None:
    winner = unbroken.trials[0]
    row = load_run(prepared, "unbroken-refit")
    assert (row["kind"], row["search_id"], row["status"]) == ("refit", "unbroken", "completed")
    assert row["test_rows"] == 300
    assert row["val_accuracy"] is None, "val was trained on"
    assert winner.best is not None
    assert row["epochs_done"] == row["best_epoch"] == winner.best["epoch"]
    rows = {each["split"]: each["rows"] for each in tables.read_table(prepared, "epochs", "unbroken-refit")}
    assert rows == {"train": 600 // 32 * 32}
    config = stored_config(prepared, "unbroken-refit")
    assert {name: getattr(config, name) for name in winner.settings} == winner.settings
    assert (config.hold_out_val, config.max_train_rows, config.epochs) == (False, 0, 3)


def test_mlflow_is_told_of_trials_and_of_the_refit(
    unbroken: search.SearchResult, prepared: Storage, mlflow_server: str
) -> None:
    if not mlflow_server:
        pytest.skip("no MLflow server could be installed and started here")
    client = tracking.mlflow_client(mlflow_server)

    def runs_of(experiment: str) -> dict[str, Any]:
        number = client.get_experiment_by_name(experiment).experiment_id
        return {run.info.run_name: run for run in client.search_runs([number])}

    trials = runs_of("unbroken")
    assert sorted(trials) == [name_of(number) for number in range(6)]
    assert trials["t0003"].data.params["lr"] == "0.001"
    told = client.get_metric_history(trials["t0003"].info.run_id, "val_accuracy")
    epochs = [each for each in tables.read_table(prepared, "epochs", "unbroken-t0003") if each["split"] == "val"]
    assert [metric.value for metric in told] == [each["accuracy"] for each in epochs]
    refit = runs_of(tracking.EXPERIMENT)["unbroken-refit"]
    assert refit.info.status == "FINISHED"
    assert refit.data.metrics["test_accuracy"] == load_run(prepared, "unbroken-refit")["test_accuracy"]
    assert refit.data.params["hold_out_val"] == "False"


def test_a_tracking_server_that_goes_away_costs_no_run(
    mlflow_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not mlflow_server:
        pytest.skip("no MLflow server could be installed and started here")
    run = tracking.MLflowRun(mlflow_server, "left-alone", {"lr": 0.1})
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(run, "_uri", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run.add_epoch({"epoch": 1, "val_accuracy": 0.5})
    run.end({"status": "completed"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("warning: --mlflow http://127.0.0.1:") for line in lines)


def test_a_tracking_server_that_does_not_answer_is_refused_beforehand(prepared: Storage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(UserError, match=f"--mlflow {uri} does not answer"):
            search.search(prepared, "untold", CONFIG, BASE, ONE_AT_A_TIME, options=search.SearchOptions(mlflow=uri))
    with pytest.raises(UserError, match=r"--mlflow sqlite:///x\.db must be the address of a tracking server"):
        search.search(
            prepared, "untold", CONFIG, BASE, ONE_AT_A_TIME, options=search.SearchOptions(mlflow="sqlite:///x.db")
        )
    assert not prepared.exists("searches", "untold")


@pytest.mark.quiet
def test_a_time_budget_ends_a_search_with_what_it_has(ray_cluster: None, prepared: Storage) -> None:
    config = SearchConfig(num_samples=1000, max_epochs=2, grace_epochs=2)
    scale = replace(ONE_AT_A_TIME, time_budget_s=15)
    started = time.monotonic()
    found = search.search(
        prepared,
        "hasty",
        config,
        replace(BASE, max_train_rows=64),
        scale,
        options=search.SearchOptions(source="synthetic"),
    )
    assert time.monotonic() - started < 60
    assert 0 < len(found.trials) < 1000
    assert {trial.status for trial in found.trials} <= {"completed", "stopped"}
    assert all(trial.status == "completed" for trial in found.trials if len(trial.history) == 2)
    cut = [trial for trial in found.trials if trial.error]
    assert len(cut) <= 1
    assert all(trial.error == "the time budget of 15 s was spent" for trial in cut)


def test_a_finished_search_is_left_alone(unbroken: search.SearchResult, prepared: Storage) -> None:
    again = search.search(
        prepared,
        "unbroken",
        CONFIG,
        BASE,
        ONE_AT_A_TIME,
        options=search.SearchOptions(source="synthetic", resume=True),
    )
    assert again.was_finished
    assert [trial.trial_id for trial in again.trials] == [trial.trial_id for trial in unbroken.trials]
    with pytest.raises(UserError, match="--search-id unbroken exists already"):
        search.search(
            prepared, "unbroken", CONFIG, BASE, ONE_AT_A_TIME, options=search.SearchOptions(source="synthetic")
        )
    other = replace(BASE, max_train_rows=100)
    with pytest.raises(UserError, match=r"--max-train-rows 100 \(was 448\)"):
        search.search(
            prepared,
            "unbroken",
            CONFIG,
            other,
            ONE_AT_A_TIME,
            options=search.SearchOptions(source="synthetic", resume=True),
        )


def test_a_checkpoint_that_cannot_be_removed_is_left_for_the_end_of_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(self: Storage, *place: str) -> None:
        asked.append(place)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(Storage, "delete_folder", refuse)
    callbacks.remove_checkpoint(open_storage(str(tmp_path)), "s", "t0000")
    assert asked == [("searches", "s", "t0000", CHECKPOINTS)]


def test_a_killed_search_goes_on_as_if_nobody_had_killed_it(
    unbroken: search.SearchResult, prepared: Storage, tmp_path: Path
) -> None:
    """SIGKILL of the driver at a random moment, the storage moved, then --resume: trials stop where they did.

    What crashes is refused here instead, and no more heard of either: two processes less have to start.
    """
    first = (PLANTED[0], PLANTED[0], *PLANTED[2:])
    storage = open_storage(str(tmp_path / "results"))
    shutil.copytree(prepared.path("data"), storage.path("data"))
    flags = ["--storage", storage.uri, "--search-id", "killed", "--source", "synthetic", "--preset", "smoke"]
    flags += ["--precision", "fp32", "--max-train-rows", "448", "--global-batch-size", "32", "--max-epochs", "3"]
    flags += [
        "--num-samples",
        "6",
        "--max-concurrent",
        "1",
        "--checkpoint-every-s",
        "0",
        "--padding",
        "zeros",
        "partial",
    ]
    flags += ["--first", *first]
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", *flags],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    begun = random.choice([name_of(number) for number in range(3, 6)])
    assert job.stdout is not None
    assert any(line.startswith(f"{begun}  epoch 1/") for line in job.stdout), "it ended before it could be killed"
    time.sleep(random.uniform(0.0, 5.0))
    job.send_signal(signal.SIGKILL)
    job.communicate()
    moved = open_storage(str(tmp_path / "moved"))
    os.rename(storage.root, moved.root)
    config = replace(CONFIG, first=first)
    found = search.search(
        moved,
        "killed",
        config,
        BASE,
        ONE_AT_A_TIME,
        options=search.SearchOptions(source="synthetic", resume=True),
    )
    assert outcomes(moved, "killed") == outcomes(prepared, "unbroken"), begun
    assert found.trials[0].trial_id == unbroken.trials[0].trial_id


def test_a_search_in_which_every_trial_fails_says_why(ray_cluster: None, prepared: Storage) -> None:
    config = SearchConfig(num_samples=2, max_epochs=1, first=('{"lr": NaN}', '{"dropout_fc": 1.5}'))
    with pytest.raises(search.SearchFailed, match=r"no trial has a result; t0000 said: --lr nan must be"):
        search.search(
            prepared, "hopeless", config, BASE, ONE_AT_A_TIME, options=search.SearchOptions(source="synthetic")
        )


def test_tpe_learns_from_trials_and_remembers_them(ray_cluster: None, prepared: Storage) -> None:
    config = SearchConfig(num_samples=3, max_epochs=1, sampler="tpe", first=('{"lr": 0.001}',))
    search.search(
        prepared,
        "tpe",
        config,
        replace(BASE, max_train_rows=64),
        ONE_AT_A_TIME,
        options=search.SearchOptions(source="synthetic"),
    )
    book = TrialStore(prepared, "tpe", config, {}, {})
    assert [trial.status for trial in book.trials.values()] == ["completed"] * 3
    low, high = config.lr
    assert all(low <= book.trials[name].settings["lr"] <= high for name in ("t0001", "t0002"))
    sampler = build_sampler(book)
    assert sampler is not None
    known = [trial.params["lr"] for trial in sampler._ot_study.trials]
    assert known == [book.trials[name].settings["lr"] for name in ("t0001", "t0002")]


def test_what_the_cluster_cannot_hold_is_refused_with_the_numbers(ray_cluster: None, prepared: Storage) -> None:
    for config, scale, told in (
        (replace(CONFIG, workers_per_trial=4), SearchScale(), "--workers-per-trial 4 with 1 CPUs .* hold 2; lower"),
        (CONFIG, SearchScale(gpus_per_trial=0.5), "--workers-per-trial 1 with 1 CPUs and 0.5 GPUs each do not fit"),
    ):
        with pytest.raises(UserError, match=told):
            search.search(
                prepared, "wide-or-gpu", config, BASE, scale, options=search.SearchOptions(source="synthetic")
            )
    assert not prepared.exists("searches", "wide-or-gpu")


# --- on GPUs --------------------------------------------------------------------------------------------------------


def test_a_refit_has_the_workers_that_its_plan_has_found_room_for(
    prepared: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One on the only GPU, though two are the default: two would be refused after all trials are done."""
    started: list[trainer.RunSpec] = []
    monkeypatch.setattr(trainer, "train", lambda storage, run: started.append(run))
    scale, manifest = SearchScale(gpus_per_trial=0.5), load_manifest(prepared)
    plan = search_plan_for([{"CPU": 8.0, "GPU": 1.0}], CONFIG, BASE, scale, manifest, refit=True)
    spec = search.SearchSpec(prepared, "one-gpu", BASE, scale, plan, manifest, search.SearchOptions(refit=True))
    search.refit_winner(spec, Trial("t0000", {}, history=[{"epoch": 1, "val_accuracy": 0.9, "val_loss": 0.3}]))
    assert [(run.scale.num_workers, run.scale.use_gpu) for run in started] == [("1", "yes")]


def test_a_trial_takes_its_share_of_a_gpu_before_anything_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        """What a GPU would be asked for."""

    def ask(share: float, device: torch.device) -> None:
        raise Asked(f"{share} of {device}")

    monkeypatch.setattr(trial, "share_of_memory", ask)
    with pytest.raises(Asked, match=r"0\.25 of cuda"):
        trial.open_run(BASE, {"use_gpu": True, "gpu_share": 0.25})


# --- the scheduler alone --------------------------------------------------------------------------------------------


def test_rungs_are_those_of_ray() -> None:
    for max_epochs in (1, 2, 3, 6, 8, 9, 16, 27, 81, 100, 243, 1000):
        for grace in (1, 2, 3):
            for factor in (2, 3, 4, 10):
                if grace <= max_epochs:
                    config = SearchConfig(max_epochs=max_epochs, grace_epochs=grace, reduction_factor=factor)
                    scheduler = ASHA(config)
                    assert config.rungs == [rung for rung, _ in reversed(scheduler._brackets[0]._rungs)]


def stops(config: SearchConfig, results: list[dict[str, Any]]) -> list[bool]:
    """Show a fresh scheduler one result of each trial; return which trials it stops."""
    scheduler = ASHA(config)
    for number in range(len(results)):
        scheduler.on_trial_add(None, TrialKey(name_of(number)))
    words = [
        scheduler.on_trial_result(None, TrialKey(name_of(number)), {"epoch": 1} | result)
        for number, result in enumerate(results)
    ]
    return [word == "STOP" for word in words]


@pytest.mark.parametrize(
    ("judge_by", "lower_loss", "lower_accuracy", "tied_accuracy"),
    [("accuracy", False, True, False), ("loss", False, False, True), ("both", False, True, True)],
)
def test_trials_are_compared_by_what_was_asked_for(
    judge_by: Literal["both", "loss", "accuracy"], lower_loss: bool, lower_accuracy: bool, tied_accuracy: bool
) -> None:
    """Of each pair, the second trial is named; whether it is stopped."""
    config, first = SearchConfig(judge_by=judge_by), {"val_accuracy": 0.5, "val_loss": 1.4}
    for expected, second in (
        (lower_loss, {"val_accuracy": 0.5, "val_loss": 1.3}),
        (lower_accuracy, {"val_accuracy": 0.4, "val_loss": 1.3}),
        (tied_accuracy, {"val_accuracy": 0.5, "val_loss": 1.5}),
    ):
        assert stops(config, [first, second]) == [False, expected], second


@pytest.mark.parametrize("bad", [{"val_accuracy": 0.1, "val_loss": 800.0}, {}])
def test_a_trial_that_went_wild_lets_no_poor_one_pass(bad: dict[str, Any]) -> None:
    """An exploded loss, or none: a cut between 1.0 and 800 would be 267, and 2.2 is chance."""
    good, poor = {"val_accuracy": 0.7, "val_loss": 1.0}, {"val_accuracy": 0.2, "val_loss": 2.2}
    assert stops(SearchConfig(), [good, bad, poor]) == [False, True, True]


def play(store: TrialStore, curves: dict[str, list[float]], stop_after: int) -> int:
    """Run trials of given curves, one at a time, until `stop_after` results were decided; return how many were."""
    with store:
        return decide(store, curves, stop_after)


def decide(store: TrialStore, curves: dict[str, list[float]], stop_after: int) -> int:
    """Run the trials of `play`."""
    scheduler = replay_scheduler(store)
    decided = 0
    for point in pending_points(store):
        name = point[TRIAL]
        store.start(name, {})
        key = TrialKey(name)
        scheduler.on_trial_add(None, key)
        for number, accuracy in enumerate(curves[name], start=1):
            metrics = {"epoch": number, "val_accuracy": accuracy, "val_loss": -math.log(accuracy), "val_rows": 1}
            metrics |= {"val_time_s": 1.0, "train_loss": 0.0, "train_accuracy": 0.0, "train_rows": 1}
            metrics |= {"epoch_time_s": 1.0, "lr": 0.1}
            store.add_epoch(name, metrics, 0.0)
            if decided == stop_after:
                return decided  # written, and killed before the decision
            decided += 1
            if scheduler.on_trial_result(None, key, metrics) == "STOP":
                break
        scheduler.on_trial_complete(None, key, metrics)
        store.end(name, "completed" if number == len(curves[name]) else "stopped")
    return decided


def test_a_replayed_scheduler_decides_as_one_that_never_stopped(tmp_path: Path) -> None:
    """Killed after every eighth result and continued, twelve trials end at the same epochs."""
    config = SearchConfig(num_samples=12, max_epochs=9)
    source = random.Random(3)
    curves = {name_of(n): [0.1 + source.random() * 0.2 + 0.08 * e for e in range(9)] for n in range(12)}

    def ends(storage: Storage) -> list[int]:
        store = TrialStore(storage, "s", config, {}, {})
        return [len(trial.history) for trial in store.trials.values()]

    whole = open_storage(str(tmp_path / "whole"))
    total = play(TrialStore(whole, "s", config, {}, {}), curves, stop_after=-1)
    assert len(set(ends(whole))) > 1, "some were stopped, some were not"
    for cut in range(0, total, 8):
        broken = open_storage(str(tmp_path / f"cut-{cut}"))
        play(TrialStore(broken, "s", config, {}, {}), curves, stop_after=cut)
        play(TrialStore(broken, "s", config, {}, {}), curves, stop_after=-1)
        assert ends(broken) == ends(whole), cut


def test_stored_settings_come_back(ray_cluster: None, unbroken: search.SearchResult, prepared: Storage) -> None:
    config, base = stored_settings.stored_settings(prepared, "unbroken")
    assert config.rungs == CONFIG.rungs
    assert base == replace(BASE, epochs=3)
