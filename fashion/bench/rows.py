"""Side-by-side measurements, by the letter of their row: both sides in one run, taking turns; medians and spread."""

from collections.abc import Callable

from fashion.bench import others, steps, trials
from fashion.bench.measurement import Measurement
from fashion.config import ScaleConfig
from fashion.storage import Storage

ROWS: dict[str, Callable[[Storage, ScaleConfig, int], list[Measurement]]] = {
    "a": steps.step_vs_limit,
    "b": steps.job_vs_step,
    "c": others.job_vs_torchrun,
    "d": steps.ingest_vs_naive_ray,
    "e": others.job_vs_keras,
    "f": steps.scaling,
    "g": steps.data_plane,
    "h": others.startup_vs_bare_trainer,
    "i": trials.trial_vs_loop,
    "j": others.time_to_accuracy,
}
