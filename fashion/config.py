"""Settings of a run: frozen, validated dataclasses, and the presets. Imports the standard library only.

A field's docstring gives its meaning, unit and range; the command line shows it as the flag's help.
A user's mistake raises `UserError`, which names the value, the limit and the way out.
"""

import dataclasses
import json
import math
import re
import reprlib
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

T = TypeVar("T")

# Environment variables that Ray is started with. Ray Train runs the training loop in a thread. glibc keeps the heaps of
# threads small, so freed activations go back to the kernel and are faulted in again, which takes 5 % of a step's time,
# unless all threads share one heap.
RAY_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}

NUM_CLASSES = 10
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_SIZE = 28
RUN_ID_PATTERN = re.compile(r"[a-z][a-z0-9._-]{0,99}(?<!\.parquet)")

Padding = Literal["zeros", "replicate", "reflect", "partial", "learned"]
Depth = Literal["vgg", "deep", "deep-bn"]
Precision = Literal["auto", "fp32", "tf32", "bf16"]

PRESET_NAMES = ("default", "best", "best-deep", "seed", "smoke")

LONGEST_MESSAGE = 2000
"""Characters of a `UserError` above which its middle is left out."""


class UserError(ValueError):
    """A user's mistake. The message is one line with the value, the limit and the way out; the exit code is 2."""

    def __init__(self, message: str) -> None:
        """Escape and shorten `message`, which may quote any value, to one line that a terminal can show."""
        line = printable(message)
        half = LONGEST_MESSAGE // 2
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} ... {line[-half:]}")


def printable(text: str) -> str:
    """Return `text` as one line that a terminal can show: every unprintable character as its escape sequence."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object; raises `ValueError` if `text` is something else, or nested too deeply to be parsed."""
    try:
        values: Any = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def build(kind: type[T], values: Any) -> T:
    """Make an instance of the dataclass `kind` from plain values, as JSON gives them.

    Raises `UserError` if a field is unknown or missing, or its value has another type.
    """
    require(isinstance(values, dict), f"settings {reprlib.repr(values)} must be a JSON object")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    require(not missing, f"setting {', '.join(missing)} is missing")
    for name, value in values.items():
        expected: Any = fields[name].type
        if not has_type(value, expected):
            type_name = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
            raise UserError(f"{flag(name)} {reprlib.repr(value)} must be of type {type_name}")
    return kind(**values)


def has_type(value: Any, annotation: Any) -> bool:
    """Tell whether a plain value is of the annotated type. An int passes as a float; a bool is neither.

    An int must fit 64 bits: JSON allows longer ones, which no float and no column can hold.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is UnionType:
        return any(has_type(value, each) for each in args)
    if origin is dict:
        return isinstance(value, dict) and all(has_type(k, args[0]) and has_type(v, args[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(has_type(each, args[0]) for each in value)
    if origin is tuple:
        args = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(args) and all(map(has_type, value, args))
    if isinstance(value, int) and not isinstance(value, bool):
        return annotation in (int, float) and abs(value) < 2**63
    return type(value) is annotation


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The hyperparameters: all settings that a run's results depend on, apart from the shape of the worker group."""

    preset: str = "default"
    """Named recipe that the other fields start from: default, best, best-deep, seed or smoke."""
    epochs: int = 3
    """Passes over the training rows, >= 1."""
    global_batch_size: int = 128
    """Rows per optimizer step, summed over the workers, >= 1."""
    lr: float = 1.5e-3
    """Peak learning rate, > 0."""
    schedule: Literal["constant", "one-cycle"] = "one-cycle"
    """How the learning rate moves within the run; one-cycle warms up, then decays along a cosine to 0."""
    warmup_fraction: float = 0.2
    """Share of the steps that the one-cycle schedule spends warming up, in [0, 1)."""
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "muon"
    """Update rule; sgd has Nesterov momentum, adamw decouples the decay, muon orthogonalises the updates of
    convolutions."""
    init: Literal["torch", "glorot", "he"] = "he"
    """Initial weights: torch's own, Glorot uniform (what Keras does), or He normal with a small last layer."""
    weight_decay: float = 0.01
    """Decay per unit of learning rate (adamw) or L2 penalty (sgd, adam), >= 0."""
    label_smoothing: float = 0.05
    """Share of the target spread evenly over the classes, in [0, 1). Reported losses do not include it."""
    dropout_conv: float = 0.0
    """Dropout rate of the convolution blocks, in [0, 1)."""
    dropout_fc: float = 0.0
    """Dropout rate of the linear layers, in [0, 1)."""
    padding: Padding = "zeros"
    """What the convolutions see beyond the border. partial rescales outputs there by the share of valid taps; learned
    multiplies them by two trained factors per convolution, one for edges and one for corners."""
    depth: Depth = "vgg"
    """Network: vgg is the published one; deep has one more convolution per block; deep-bn adds batch normalisation."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Horizontal flips: none; random draws for each image and epoch; alternating draws once for each image, then flips
    it in every other epoch."""
    shift: int = 0
    """Largest random shift in pixels along each axis, 0 to 8; 0 turns it off."""
    erase: float = 0.0
    """Share of training images, in [0, 1), in which a rectangle of 2 to 40 % of the area is erased; 0 turns it off."""
    ema_decay: float = 0.0
    """Decay of the weights' exponential moving average per step, in [0, 1), lower in the first steps. val, the choice
    of the checkpoint, and test use the average; 0 turns it off, and they use the weights themselves."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation: flip averages the logits of an image and of its mirror image; none averages nothing."""
    precision: Precision = "auto"
    """Arithmetic of the forward and backward pass; auto uses bf16 where the hardware has it natively, else fp32. tf32
    is for GPUs: products of fp32 numbers rounded to 10 bits, which is quicker there."""
    deterministic: bool = False
    """On GPUs, use only kernels that repeat their bits on the same kind of GPU, which may be slower. CPUs do anyway."""
    cuda_graph: bool = False
    """On GPUs, record a training step once and replay it, which saves its launches. Where recording fails, a line says
    so, and the run goes on without."""
    data_mode: Literal["resident", "streaming"] = "resident"
    """Where training rows are: resident on the worker's device, or streamed from Ray Data in every epoch."""
    max_train_rows: int = 0
    """Train on a random subset of this many rows, drawn with the seed; 0 takes all."""
    hold_out_val: bool = True
    """Keep val out of training; otherwise the run trains on all 60,000 rows, and the last epoch is the chosen one."""
    stop_after: int = 0
    """Stop after this many epochs, while the schedule still spans --epochs; 0 trains to the end."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout, 0 to 2**31 - 1."""

    def __post_init__(self) -> None:
        require(self.preset in PRESET_NAMES, unknown_preset(self.preset))
        require(self.epochs >= 1, f"--epochs {self.epochs} must be at least 1")
        require(self.global_batch_size >= 1, f"--global-batch-size {self.global_batch_size} must be at least 1")
        require(
            math.isfinite(self.lr) and 0 < self.lr <= 100,
            f"--lr {self.lr} must be a finite number above 0 and at most 100",
        )
        require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            f"--weight-decay {self.weight_decay} must be finite and at least 0",
        )
        for name in ("warmup_fraction", "label_smoothing", "dropout_conv", "dropout_fc", "erase", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{flag(name)} {value} must lie in [0, 1), that is 0 <= value < 1")
        require(0 <= self.shift <= 8, f"--shift {self.shift} must lie between 0 and 8 pixels")
        require(self.max_train_rows >= 0, f"--max-train-rows {self.max_train_rows} must be 0 (all) or more")
        require(
            self.hold_out_val or self.data_mode == "resident",
            "--no-hold-out-val joins two splits in memory; use it with --data-mode resident",
        )
        require(
            0 <= self.stop_after <= self.epochs,
            f"--stop-after {self.stop_after} must lie between 0 and --epochs {self.epochs}",
        )
        require(0 <= self.seed < 2**31, f"--seed {self.seed} must lie between 0 and {2**31 - 1}")

    @property
    def last_epoch(self) -> int:
        """Number of the run's last epoch."""
        return self.stop_after or self.epochs

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, the form in which reports store them and workers receive them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain values; raises `UserError` naming a field that is unknown, or of another type."""
        return build(cls, values)

    def steps_per_epoch(self, num_train_rows: int) -> int:
        """Return the number of full global batches in `num_train_rows`.

        The remaining rows sit out; they are others in every epoch. Raises `UserError` if not one batch is full.
        """
        steps = num_train_rows // self.global_batch_size
        require(
            steps >= 1,
            f"--global-batch-size {self.global_batch_size} is more than the {num_train_rows} training rows; "
            "lower it or raise --max-train-rows",
        )
        return steps


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Shape of the worker group. It determines the speed; with another shape, only rounding errors differ."""

    num_workers: str = "2"
    """Worker processes: a number, or MIN:MAX to continue with fewer when some are lost."""
    cpus_per_worker: float = 1.0
    """CPUs reserved for each worker, > 0; the worker computes with that many threads, at least one."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """One GPU per worker. auto prefers one GPU to any number of CPUs: where there are too few GPUs for --num-workers,
    it takes fewer workers, and the plan says so."""

    wait_for_nodes_s: float | None = None
    """Seconds to wait for nodes where the cluster is too small, >= 0; by default 600 with an autoscaler, else 0."""

    def __post_init__(self) -> None:
        check_wait(self.wait_for_nodes_s)
        match = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", self.num_workers)
        require(
            match is not None, f"--num-workers {self.num_workers} must be a number such as 2, or MIN:MAX such as 1:2"
        )
        low, high = self.worker_range
        require(1 <= low <= high, f"--num-workers {self.num_workers} must be at least 1, and MIN at most MAX")
        require(
            math.isfinite(self.cpus_per_worker) and self.cpus_per_worker > 0,
            f"--cpus-per-worker {self.cpus_per_worker} must be above 0",
        )
        whole = self.cpus_per_worker < 1 or self.cpus_per_worker == int(self.cpus_per_worker)
        require(whole, f"--cpus-per-worker {self.cpus_per_worker} must be a whole number, or a fraction below 1")

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers; equal when the number is fixed."""
        low, _, high = self.num_workers.partition(":")
        return int(low), int(high or low)

    @property
    def threads_per_worker(self) -> int:
        """Threads that each worker computes with."""
        return max(1, int(self.cpus_per_worker))

    def check_batch(self, global_batch_size: int) -> None:
        """Raise `UserError` unless every allowed number of workers divides `global_batch_size`."""
        low, high = self.worker_range
        for width in range(low, high + 1):
            lower, upper = global_batch_size // width * width, -(-global_batch_size // width) * width
            ways = " or ".join(str(size) for size in sorted({lower, upper} - {0}))
            require(
                global_batch_size % width == 0,
                f"--global-batch-size {global_batch_size} is not divisible by {width} workers; take {ways}",
            )


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """How a run handles faults. The settings determine how much work a fault costs, and do not affect the results."""

    checkpoint_every_s: float = 120.0
    """Seconds of work that a fault may cost, >= 0: the longest time between two checkpoints within an epoch."""
    max_failures: int = 3
    """How often workers that died, failed or hung are restarted from the latest checkpoint, >= 0; -1 sets no limit."""
    hang_timeout_s: float = 600.0
    """Seconds without a step after which a worker's stacks are saved and the worker is killed, >= 1; 0 means never."""
    resize_every_s: float = 30.0
    """Seconds, >= 1, between two looks whether a run with a range of workers has room for more (Ray's default is 60).

    To take them in costs a start of the workers and the work since the latest checkpoint.
    """

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.checkpoint_every_s) and self.checkpoint_every_s >= 0,
            f"--checkpoint-every-s {self.checkpoint_every_s} must be a finite number of seconds, 0 or more",
        )
        require(self.max_failures >= -1, f"--max-failures {self.max_failures} must be at least 0, or -1 for no limit")
        require(
            math.isfinite(self.hang_timeout_s) and (self.hang_timeout_s >= 1 or self.hang_timeout_s == 0),
            f"--hang-timeout-s {self.hang_timeout_s} must be at least 1 second, or 0 for never",
        )
        require(
            math.isfinite(self.resize_every_s) and self.resize_every_s >= 1,
            f"--resize-every-s {self.resize_every_s} must be a finite number of seconds, at least 1",
        )


def check_wait(wait_for_nodes_s: float | None) -> None:
    """Raise `UserError` unless the time to wait for nodes is none at all, or a finite number from 0 on."""
    require(
        wait_for_nodes_s is None or (math.isfinite(wait_for_nodes_s) and wait_for_nodes_s >= 0),
        f"--wait-for-nodes-s {wait_for_nodes_s} must be a finite number of seconds, 0 or more",
    )


def flag(field_name: str) -> str:
    """Return the command-line spelling of a field: `dropout_fc` is `--dropout-fc`."""
    return "--" + field_name.replace("_", "-")


def unknown_preset(name: str) -> str:
    """Return the message for a preset that does not exist."""
    return f"--preset {name} does not exist; known are {', '.join(PRESET_NAMES)}"


def check_run_id(run_id: str, name: str = "--run-id") -> None:
    """Raise `UserError` unless `run_id`, the value of the flag `name`, is a safe folder name that starts with a letter.

    Without the letter, readers of the reports would take ids such as 001 for numbers.
    """
    require(
        RUN_ID_PATTERN.fullmatch(run_id) is not None,
        f"{name} {run_id!r} must start with a letter a-z and hold only a-z, 0-9, '.', '_' and '-' (at most 100, "
        "without .parquet at its end)",
    )


def preset(name: str) -> TrainConfig:
    """Return the recipe called `name`.

    - `seed`: the published recipe. Published are the network, four final numbers (train accuracy 0.9684 and loss
      0.0909, test accuracy 0.9304 and loss 0.2591), that nothing was augmented, and that it overfits from epoch 10 on.
      Assumed, because not published, are Adam at a constant 1e-3, batch 128, dropout 0.25 after convolutions and 0.5
      between linear layers, 20 epochs, Keras' initial weights, and torch's Adam (epsilon is 1e-8; Keras has 1e-7).
    - `default`: the best recipe known so far for about ten minutes on two CPU cores with bf16.
    - `best`: the same network and optimizer for more epochs, with measures against overfitting: shifts, an average of
      the weights over about 500 steps (a little more than an epoch), and test-time augmentation.
    - `best-deep`: the same with one more convolution per block and batch normalisation, for still more epochs.
    - `smoke`: the whole path in under a minute, on few rows; its accuracy means nothing.

    Raises `UserError` for any other name.
    """
    require(name in PRESET_NAMES, unknown_preset(name))
    if name == "seed":
        return TrainConfig(
            preset="seed",
            epochs=20,
            lr=1e-3,
            schedule="constant",
            optimizer="adam",
            weight_decay=0.0,
            init="glorot",
            label_smoothing=0.0,
            dropout_conv=0.25,
            dropout_fc=0.5,
            flip="none",
        )
    against_overfitting: dict[str, Any] = {"shift": 1, "ema_decay": 0.998, "tta": "flip"}
    if name == "best":
        return TrainConfig(preset="best", epochs=10, **against_overfitting)
    if name == "best-deep":
        return TrainConfig(preset="best-deep", epochs=12, depth="deep-bn", **against_overfitting)
    if name == "smoke":
        return TrainConfig(preset="smoke", epochs=2, max_train_rows=1024, global_batch_size=64)
    return TrainConfig()
