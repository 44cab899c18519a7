"""The rows of `jobs.bench` by their letter: the function that measures each, both sides of it in one run."""

from collections.abc import Callable

from fashion.bench import programs, steps, trials
from fashion.bench.measurement import Measurement
from fashion.bench.scale import growth
from fashion.config import ScaleConfig
from fashion.storage import Storage

ROWS: dict[str, Callable[[Storage, ScaleConfig, int], list[Measurement]]] = {
    "a": steps.step_vs_limit,
    "b": steps.job_vs_step,
    "c": programs.job_vs_torchrun,
    "d": steps.ingest_vs_naive_ray,
    "e": programs.job_vs_keras,
    "f": steps.scaling,
    "g": steps.data_plane,
    "h": programs.startup_vs_bare_trainer,
    "i": trials.trial_vs_loop,
    "j": programs.time_to_accuracy,
    "k": programs.job_on_gpus,
    "l": growth.search_vs_tune,
    "m": trials.tasks_vs_actors,
}
"""Letter -> `measure(storage, scale, repeats)`, which times each side `repeats` times."""
