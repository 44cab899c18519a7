"""Settings of a search: the ranges to draw from, the draws, the epochs at which trials are judged, the resources.

Imports the standard library only, like `fashion.config`. As there, a field's docstring gives its meaning, unit and
range, and is the help of its flag.
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from typing import Any, Literal, Self

from fashion.config import (
    Depth,
    Padding,
    ScaleConfig,
    TrainConfig,
    UserError,
    build,
    check_wait,
    flag,
    parse_object,
    require,
)

# The settings of `TrainConfig` that a search can draw, by distribution; each is a field of `SearchConfig`.
LOG_UNIFORM = ("lr", "weight_decay")
UNIFORM = ("dropout_conv", "dropout_fc", "label_smoothing")
CHOICES = ("padding", "depth")

TRIAL = "trial"
"""Key of the trial's name, such as `t0003`, in its point. Tune's own trial ids change when a search is resumed."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What a search tries and how it spends its epochs. A range is LOW HIGH, both included."""

    num_samples: int = 16
    """Trials, 1 to 10000."""
    max_epochs: int = 6
    """Epochs of a trial that is never stopped, and of its schedule, >= 1."""
    grace_epochs: int = 1
    """Epochs that a trial runs before it is judged for the first time, 1 to --max-epochs."""
    reduction_factor: int = 3
    """At each rung about one trial in this many goes on, and rungs lie this factor apart, >= 2."""
    judge_by: Literal["both", "loss", "accuracy"] = "both"
    """Figures of val that are compared at a rung: accuracies tie at chance, losses punish early overconfidence. The
    winner is the one with the best accuracy, whatever this says."""
    sampler: Literal["random", "tpe"] = "random"
    """Where settings come from: independent draws, or Optuna's TPE, which learns from the trials before."""
    lr: tuple[float, float] = (3e-4, 3e-2)
    """Peak learning rates, log-uniform."""
    dropout_conv: tuple[float, float] = (0.0, 0.5)
    """Dropout rates of the convolution blocks, uniform."""
    dropout_fc: tuple[float, float] = (0.0, 0.7)
    """Dropout rates of the linear layers, uniform."""
    weight_decay: tuple[float, float] | None = None
    """Weight decays, log-uniform; the preset's if not given."""
    label_smoothing: tuple[float, float] | None = None
    """Label smoothing, uniform; the preset's if not given."""
    padding: tuple[Padding, ...] = ()
    """Paddings to choose from; the preset's if not given."""
    depth: tuple[Depth, ...] = ()
    """Networks to choose from: vgg (7,001,194 parameters), deep (7,628,202), deep-bn (7,630,122)."""
    first: tuple[str, ...] = ()
    """Settings to try before any are drawn, each a JSON object such as '{"lr": 0.001}'; the rest of it is drawn."""
    workers_per_trial: int = 1
    """Workers of each trial; one runs in the trial's own process, more are a Ray Train run of their own, >= 1."""
    seed: int = 0
    """Seed of the draws, and of every trial's weights and order, 0 to 2**31 - 1."""

    def __post_init__(self) -> None:
        limits = {"num_samples": (1, 10_000), "max_epochs": (1, 100_000), "grace_epochs": (1, self.max_epochs)}
        limits |= {"reduction_factor": (2, 1000), "workers_per_trial": (1, 10_000), "seed": (0, 2**31 - 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            require(low <= value <= high, f"{flag(name)} {value} must lie between {low} and {high}")
        for name in LOG_UNIFORM + UNIFORM:
            bounds = getattr(self, name)
            if bounds is not None:
                self._check_range(name, *bounds)
        for name in CHOICES:
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"{flag(name)} names {' '.join(values)}: each one once")
        searched = self.searched()
        for text in self.first:
            unknown = sorted(set(parse_settings(text)) - set(searched))
            require(
                not unknown,
                f"--first {text} sets {', '.join(unknown)}; this search draws {', '.join(sorted(searched))}",
            )

    @staticmethod
    def _check_range(name: str, low: float, high: float) -> None:
        require(
            math.isfinite(low) and math.isfinite(high) and low <= high,
            f"{flag(name)} {low} {high} must be two finite numbers, the lower one first",
        )
        require(name not in LOG_UNIFORM or low > 0, f"{flag(name)} {low} {high} is log-uniform; LOW must be above 0")
        for value in (low, high):
            TrainConfig.from_dict({name: value})  # refuses a value that no run accepts

    def searched(self) -> list[str]:
        """Return the names of the settings that the search draws."""
        return [name for name in LOG_UNIFORM + UNIFORM + CHOICES if getattr(self, name)]

    @property
    def rungs(self) -> list[int]:
        """Epochs at which trials are judged, ascending; the same as those of Ray 2.60's `ASHAScheduler`."""
        count = int(math.log(self.max_epochs / self.grace_epochs) / math.log(self.reduction_factor) + 1)
        return [self.grace_epochs * self.reduction_factor**k for k in range(count)]

    def first_settings(self, number: int) -> dict[str, Any]:
        """Return the settings that `first` gives to trial `number`, counted from 0; none beyond its end."""
        return parse_settings(self.first[number]) if number < len(self.first) else {}

    def draw(self, number: int) -> dict[str, Any]:
        """Return the settings of trial `number`, counted from 0: those of `first`, the others drawn.

        A draw depends only on the seed, the trial's number and the setting's name, so that it stays the same when the
        search resumes, gets more trials, or draws other settings as well.
        """
        settings: dict[str, Any] = {}
        for name in self.searched():
            generator = random.Random(f"{self.seed}/{number}/{name}")  # noqa: S311  # nothing to keep secret
            values = getattr(self, name)
            if name in CHOICES:
                settings[name] = generator.choice(values)
            elif name in LOG_UNIFORM:
                settings[name] = math.exp(generator.uniform(math.log(values[0]), math.log(values[1])))
            else:
                settings[name] = generator.uniform(*values)
        return settings | self.first_settings(number)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain values, as JSON gives them.

        Raises `UserError` naming a field that is unknown or missing, or whose value is of another type or out of range.
        """
        if not isinstance(values, dict):
            return build(cls, values)
        return build(cls, {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def parse_settings(text: str) -> dict[str, Any]:
    """Parse one value of `--first`; raises `UserError` unless it is a JSON object."""
    try:
        return parse_object(text)
    except ValueError as error:
        raise UserError(f"--first {text} must be a JSON object such as '{{\"lr\": 0.001}}' ({error})") from error


@dataclass(frozen=True, kw_only=True)
class SearchScale:
    """The resources and the time that a search may use; they may be others when the search is resumed."""

    cpus_per_worker: float = 1.0
    """CPUs reserved for each worker of a trial, > 0; the worker runs that many threads (at least one)."""
    gpus_per_trial: float = 0.0
    """GPUs of a trial: with one worker a fraction shares a GPU, with several there is one for each."""
    wait_for_nodes_s: float | None = None
    """Seconds to wait for nodes where not one trial fits, >= 0; by default 600 with an autoscaler, else 0."""
    max_concurrent: int = 0
    """Most trials at a time; 0 takes as many as the cluster has room for, also while it grows or shrinks."""
    time_budget_s: float = 0.0
    """Seconds after which the search ends with what it has; 0 sets no limit."""
    checkpoint_every_s: float = 30.0
    """Seconds of work that a fault may cost a one-worker trial, >= 0: its checkpoints, within epochs too, are so far
    apart at most. 0 saves at every opportunity."""
    refit_workers: int = 2
    """Workers of the run that trains the winner on all rows, >= 1."""

    def __post_init__(self) -> None:
        ScaleConfig(num_workers="1", cpus_per_worker=self.cpus_per_worker)
        check_wait(self.wait_for_nodes_s)
        require(self.refit_workers >= 1, f"--refit-workers {self.refit_workers} must be at least 1")
        for name in ("gpus_per_trial", "max_concurrent", "time_budget_s", "checkpoint_every_s"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{flag(name)} {value} must be finite and at least 0")
        whole = self.gpus_per_trial < 1 or self.gpus_per_trial == int(self.gpus_per_trial)
        require(whole, f"--gpus-per-trial {self.gpus_per_trial} must be a whole number, or a fraction below 1")

    def check_workers(self, workers_per_trial: int) -> None:
        """Raise `UserError` unless a trial's GPUs fit its workers: one worker uses at most one GPU, several use none or
        one each, since NCCL does not share a GPU between ranks.
        """
        require(
            workers_per_trial == 1 or self.gpus_per_trial in (0, workers_per_trial),
            f"--gpus-per-trial {self.gpus_per_trial:g} with --workers-per-trial {workers_per_trial} must be 0 or "
            f"{workers_per_trial}: one GPU for each worker",
        )
        require(
            workers_per_trial > 1 or self.gpus_per_trial <= 1,
            f"--gpus-per-trial {self.gpus_per_trial:g} is more than the one GPU that one worker uses; "
            "take at most 1, or more --workers-per-trial",
        )
