"""Ray's documented API alone: runs that are broken go on to the same bits, and searches stop trials with workers.

Passes under every Ray that pyproject.toml allows: `make test-rays`. All other tests use `ray_internals` where they can.
"""

import signal
import subprocess
from dataclasses import replace

import pytest
import ray
from conftest import ROOT, assert_refused, call_job, wait_for
from drivers import Driver, outcome

import jobs.train
from fashion.cluster.address import check_address
from fashion.cluster.plan import make_plan
from fashion.config import ScaleConfig, TrainConfig, UserError
from fashion.data.manifest import load_manifest
from fashion.distributed import trainer, trainers
from fashion.reports.runs import load_run
from fashion.reports.tables import read_table
from fashion.search import search
from fashion.search.space import SearchConfig, SearchScale
from fashion.search.trial_store import name_of
from fashion.storage import Storage
from fashion.training.checkpoint_manager import CheckpointManager

pytestmark = [pytest.mark.ray, pytest.mark.engine]

GOOD = '{"lr": 0.001, "dropout_conv": 0.0, "dropout_fc": 0.0}'
POOR = '{"lr": 0.03, "dropout_conv": 0.5}'
BASE = TrainConfig(preset="smoke", max_train_rows=448, global_batch_size=32, precision="fp32")


@pytest.fixture(autouse=True)
def documented_api_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trainers.SWITCH, "no")


def test_internals_are_used_under_a_ray_that_they_were_tested_with(
    monkeypatch: pytest.MonkeyPatch, tiny_storage: Storage
) -> None:
    assert not trainers.uses_internals()
    monkeypatch.setenv(trainers.SWITCH, "auto")
    assert trainers.uses_internals() == (ray.__version__ in trainers.TESTED_RAY)
    monkeypatch.setattr(ray, "__version__", "2.60.1")
    assert not trainers.uses_internals()
    monkeypatch.setenv(trainers.SWITCH, "yes")
    done = call_job(jobs.train.main, "--storage", tiny_storage.uri, "--run-id", "never")
    assert_refused(done, "FASHION_RAY_INTERNALS=yes must be auto or no")
    assert not tiny_storage.exists("runs", "never")


def begun(storage: Storage, run_id: str) -> Driver:
    """Return a driver of a run that has made a checkpoint since it was started."""
    before = newest(storage, run_id)
    driver = Driver(storage, run_id, every_s=0)
    driver.wait_for(lambda: newest(storage, run_id) not in (None, before))
    return driver


def newest(storage: Storage, run_id: str) -> str | None:
    return CheckpointManager(storage, ("runs", run_id), newest=2).newest_whole()[0]


def test_a_run_goes_on_to_the_same_bits_whoever_ends_it(tiny_storage: Storage) -> None:
    """One is ended by Ctrl-C, goes on, loses a worker, and goes on; of another one the driver is killed."""
    driver = begun(tiny_storage, "engine-one")
    driver.process.send_signal(signal.SIGINT)
    said = driver.wait()
    assert driver.process.returncode == 1, said
    assert "continue with --run-id engine-one --resume" in said
    assert load_run(tiny_storage, "engine-one")["status"] == "interrupted"
    driver = begun(tiny_storage, "engine-one")
    driver.workers()[0].kill()
    said = driver.wait()
    assert driver.process.returncode == 0, said
    assert " failed: " in said
    assert "goes on from checkpoint" in said

    driver = begun(tiny_storage, "engine-two")
    driver.process.kill()
    driver.wait()
    driver = Driver(tiny_storage, "engine-two")
    said = driver.wait()
    assert driver.process.returncode == 0, said
    assert "goes on from checkpoint" in said
    rows, weights = outcome(tiny_storage, "engine-two")
    other_rows, other_weights = outcome(tiny_storage, "engine-one")
    assert rows == other_rows
    assert all(weights[name].equal(other_weights[name]) for name in weights)


def actors() -> dict[str, str]:
    """Return the class of every actor that the cluster has seen, by id."""
    return {number: entry["ActorClassName"] for number, entry in ray._private.state.actors().items()}


def test_a_streamed_run_of_any_width_counts_every_row(ray_cluster: None, tiny_storage: Storage) -> None:
    """And the controller is Ray's own, as an actor."""
    before = set(actors())
    config = replace(BASE, epochs=1, max_train_rows=256, data_mode="streaming")
    scale = ScaleConfig(num_workers="1:2", cpus_per_worker=0.5)
    manifest = load_manifest(tiny_storage)
    plan = make_plan(config, scale, manifest)
    spec = trainer.RunSpec("engine-stream", config, scale)
    rows = trainer.read_rows(tiny_storage, manifest, config)
    row = trainer.fit_and_choose(trainer.PlannedRun(tiny_storage, spec, plan, manifest, rows))
    assert (row["status"], row["world_size"]) == ("completed", 2)
    counted = [(each["split"], each["rows"]) for each in read_table(tiny_storage, "epochs", "engine-stream")]
    assert counted == [("train", 256), ("val", 100)]
    started = {name for number, name in actors().items() if number not in before}
    assert {"TrainController", "Board"} <= started


def find_trials(storage: Storage, search_id: str, config: SearchConfig) -> list[tuple[str, int]]:
    """Run a search; return the status and the epochs of each trial."""
    search.search(storage, search_id, config, BASE, SearchScale(max_concurrent=1))
    rows = [read_table(storage, "trials", f"{search_id}-{name_of(number)}")[0] for number in range(config.num_samples)]
    return [(row["status"], row["epochs_done"]) for row in rows]


def test_a_search_stops_poor_trials(ray_cluster: None, tiny_storage: Storage) -> None:
    config = SearchConfig(num_samples=3, max_epochs=2, reduction_factor=2, first=(GOOD, POOR, POOR))
    assert find_trials(tiny_storage, "engine-narrow", config) == [("completed", 2), ("stopped", 1), ("stopped", 1)]


def test_a_trial_takes_the_cpus_of_one_that_was_stopped(ray_cluster: None, tiny_storage: Storage) -> None:
    """Each takes both CPUs."""
    config = SearchConfig(
        num_samples=3, max_epochs=2, reduction_factor=2, workers_per_trial=2, first=(POOR, GOOD, POOR)
    )
    assert find_trials(tiny_storage, "engine-wide", config) == [("completed", 2), ("completed", 2), ("stopped", 1)]
    assert load_run(tiny_storage, "engine-wide-t0001")["world_size"] == 2
    wait_for(lambda: not workers_alive(), "end of the workers")


def workers_alive() -> list[str]:
    """Return the ids of Ray Train's workers that live."""
    everyone = ray._private.state.actors().items()
    return [n for n, each in everyone if each["ActorClassName"] == "RayTrainWorker" and each["State"] == "ALIVE"]


@pytest.mark.skipif(ray.__version__ in trainers.TESTED_RAY, reason="needs two versions of Ray: make test-rays")
def test_a_head_of_another_ray_is_told_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code = "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False); "
    code += "print(ray.__version__, ray.get_runtime_context().gcs_address, flush=True); input()"
    command = [str(ROOT / ".venv" / "bin" / "python"), "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as head:
        assert head.stdout is not None
        version, address = head.stdout.readline().split()
        with pytest.raises(UserError) as refusal:
            check_address(address)
        head.communicate("\n")
    assert version != ray.__version__
    assert all(told in str(refusal.value) for told in (f"RAY_ADDRESS={address}", version, ray.__version__))
