"""The rows of `jobs.bench` on what is not a run: the trials of a search against the bare training loop, and evaluation
by Ray tasks against a pool of actors under Ray Data.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.tune
import torch

from fashion.bench.measurement import Measurement, alternate, inverse, require_folder
from fashion.cluster.plan import Plan, make_plan
from fashion.config import ScaleConfig, TrainConfig, require
from fashion.data import loading
from fashion.data.manifest import load_manifest
from fashion.distributed import trainer, worker
from fashion.inference import evaluation
from fashion.inference.classifier import ROWS_PER_BATCH, load_model
from fashion.model.device import set_arithmetic
from fashion.reports.runs import load_run
from fashion.search import search, trial
from fashion.search.plan import make_search_plan
from fashion.search.space import SearchConfig, SearchScale
from fashion.search.trial_store import name_of
from fashion.storage import Storage, open_storage
from fashion.training.run import prepare_process


def trial_vs_loop(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row i: the time of a one-worker trial, without the start of its process, against the bare loop over the same
    rows; and the start of a trial against the start of a Tune trial of an empty function.

    Trials run one at a time. The start of a trial is the time from the end of the one before to its begin.
    """
    require_folder(storage, "i")
    base = TrainConfig(max_train_rows=2048)
    point = json.dumps({"lr": base.lr, "dropout_conv": base.dropout_conv, "dropout_fc": base.dropout_fc})
    config = SearchConfig(num_samples=repeats + 1, max_epochs=2, grace_epochs=2, first=(point,) * (repeats + 1))
    one_at_a_time = SearchScale(max_concurrent=1, cpus_per_worker=scale.cpus_per_worker)
    with tempfile.TemporaryDirectory() as folder:
        scratch = open_storage(folder)
        Path(folder, "data").symlink_to(storage.path("data"))
        search.search(scratch, "bench", config, base, one_at_a_time, options=search.SearchOptions(source="auto"))
        runs = [load_run(scratch, f"bench-{name_of(number)}") for number in range(repeats + 1)]
    bare = bare_loops(storage, replace(base, epochs=2), one_at_a_time, repeats)
    trials = [run["wall_s"] for run in runs[1:]]
    starts = [(after["started_at"] - before["finished_at"]).total_seconds() for before, after in pairwise(runs)]
    threads = max(1, int(scale.cpus_per_worker))
    return [
        Measurement("i_loop_time_vs_trial_time", "1/h", inverse(trials), inverse(bare), 0.95, threads),
        Measurement(
            "i_empty_start_plus_1_s_vs_start",
            "1/h",
            inverse(starts),
            inverse([start + 1 for start in empty_starts(repeats)]),
            1.0,
            threads,
        ),
    ]


def bare_loops(storage: Storage, config: TrainConfig, scale: SearchScale, repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` bare loops in one process; one more runs first, to warm up."""
    manifest = load_manifest(storage)
    plan = make_search_plan(SearchConfig(max_epochs=config.epochs), config, scale, manifest)
    spec = search.SearchSpec(storage, "bare", config, scale, plan, manifest, search.SearchOptions())
    shared = search.shared_by_trials(spec, SearchConfig(), trainer.read_rows(storage, manifest, config))
    looper = ray.remote(num_cpus=plan.trial.cpus_per_worker)(time_bare_loop)
    return list(ray.get(looper.remote(config.to_dict(), shared, repeats)))


def time_bare_loop(settings: dict[str, Any], shared: dict[str, Any], repeats: int) -> list[float]:
    """Time what a trial does, without reports and checkpoints. Runs as a Ray task, in a process of its own."""
    worker.prepare_worker(shared["threads"])
    config = TrainConfig.from_dict(settings)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _metrics in trial.open_run(config, shared).epochs():
            pass
        times.append(time.perf_counter() - started)
    return times[1:]


class StartTimes(ray.tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Records when Tune's trials start and end."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.ended: list[float] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a start."""
        self.started.append(time.perf_counter())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record an end."""
        self.ended.append(time.perf_counter())


def empty_starts(repeats: int) -> list[float]:
    """Return the seconds that each start of a Tune trial of an empty function takes, with Tune's own settings."""
    times = StartTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainable = ray.tune.with_resources(lambda config: {"done": True}, {"CPU": 1})
        tune_config = ray.tune.TuneConfig(num_samples=repeats + 1, max_concurrent_trials=1)
        run_config = ray.tune.RunConfig(storage_path=folder, callbacks=[times], verbose=0)
        ray.tune.Tuner(trainable, tune_config=tune_config, run_config=run_config).fit()
    return [after - before for before, after in zip(times.ended[:-1], times.started[1:], strict=True)]


# --- m: evaluation ----------------------------------------------------------------------------------------------------


def tasks_vs_actors(storage: Storage, scale: ScaleConfig, repeats: int) -> list[Measurement]:
    """Row m: an evaluation of all test rows on CPUs, as `evaluation.predict` does it, against `map_batches` with a
    class that loads the checkpoint once per actor, one actor per worker. Both give the same predictions.
    """
    require_folder(storage, "m")
    config = TrainConfig(preset="smoke", epochs=1, max_train_rows=1024)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").symlink_to(storage.path("data"))
        place = open_storage(folder)
        trainer.train(place, trainer.RunSpec("evaluated", config, scale))
        row, plan = load_run(place, "evaluated"), make_plan(config, scale, load_manifest(place))
        require(not plan.use_gpu, "row m compares evaluations on CPUs; take --use-gpu no")
        found: dict[str, pa.Table] = {}

        def timed(name: str, evaluate: Callable[[], pa.Table]) -> float:
            started = time.perf_counter()
            found[name] = evaluate()
            return 3600 / (time.perf_counter() - started)

        rates = alternate(
            {
                "tasks": lambda repeat: timed("tasks", lambda: evaluation.predict(place, row, "test", plan)),
                "actors": lambda repeat: timed("actors", lambda: predict_by_actors(place, row, plan)),
            },
            repeats,
        )
    assert found["tasks"]["predicted"].equals(found["actors"]["predicted"])
    return [
        Measurement("m_evaluation_tasks_vs_actors", "1/h", rates["tasks"], rates["actors"], 0, plan.threads_per_worker)
    ]


class Classifier:
    """Classifies batches with the network that it loads when its actor starts."""

    def __init__(self, spec: evaluation.ModelSpec) -> None:
        prepare_process(spec.threads)
        self._spec, self._config = spec, TrainConfig.from_dict(spec.config)
        self._device = torch.device("cpu")
        set_arithmetic(spec.precision, self._config.deterministic, self._device)
        self._model = load_model(open_storage(spec.storage), spec.folder, self._config, self._device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return a batch's columns as `evaluation.classify_batch` does."""
        return evaluation.classify_batch(self._model, batch, self._spec.precision, self._device, self._config.tta)


def predict_by_actors(storage: Storage, row: dict[str, Any], plan: Plan) -> pa.Table:
    """Classify `test` with one execution of Ray Data, which reads it as well; return predictions sorted by index."""
    spec = evaluation.ModelSpec(
        storage=storage.uri,
        folder=row["checkpoint"],
        config=json.loads(row["config_json"]),
        precision=row["precision"],
        threads=plan.threads_per_worker,
        use_gpu=False,
    )
    rows = loading.open_dataset(storage, load_manifest(storage), ["test"]).repartition(plan.num_workers[1])
    classified = rows.map_batches(
        Classifier,
        fn_constructor_args=(spec,),
        batch_size=ROWS_PER_BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=plan.num_workers[1]),
        num_cpus=plan.cpus_per_worker / 2,  # reading takes the other half
    )
    return pa.concat_tables(ray.get(classified.to_arrow_refs())).sort_by("index")
