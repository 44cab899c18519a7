"""Side-by-side measurements, by the letter of their row: both sides in one run, taking turns; medians and spread."""

from collections.abc import Callable

from fashion import bench_others, bench_steps, bench_trials
from fashion.config import ScaleConfig
from fashion.measurement import Measurement
from fashion.storage import Storage

ROWS: dict[str, Callable[[Storage, ScaleConfig, int], list[Measurement]]] = {
    "a": bench_steps.step_vs_limit,
    "b": bench_steps.job_vs_step,
    "c": bench_others.job_vs_torchrun,
    "d": bench_steps.ingest_vs_naive_ray,
    "e": bench_others.job_vs_keras,
    "f": bench_steps.scaling,
    "g": bench_steps.data_plane,
    "h": bench_others.startup_vs_bare_trainer,
    "i": bench_trials.trial_vs_loop,
    "j": bench_others.time_to_accuracy,
}
