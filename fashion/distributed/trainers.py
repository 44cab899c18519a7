"""How a run talks to Ray Train: by its documented API alone, or with `ray_internals`, which starts sooner.

`ray_internals` overrides private parts of Ray, so it is loaded only under a Ray that it was tested with. Everything
works without it. The environment variable FASHION_RAY_INTERNALS (auto or no) switches it off.
"""

import contextlib
import dataclasses
import os
import queue
import secrets
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
import ray.train
import ray.util
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fashion.cluster.board import Board
from fashion.config import require
from fashion.reports.progress import last_line

# Versions of Ray under which the tests have run `ray_internals`.
TESTED_RAY = ("2.60.0",)
SWITCH = "FASHION_RAY_INTERNALS"
# How often Ray's controller looks at its workers; each epoch's report waits for the next look. Ray's default is 2 s.
INTERVAL_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
HEALTH_CHECK_INTERVAL_S = 0.5
# How long Ctrl-C waits for the workers to end. Ray acts on it only when workers that start have started; a second
# Ctrl-C does not wait.
SECONDS_TO_STOP = 30.0

Work = Callable[[dict[str, Any]], Any]
"""What every worker calls with the settings of the run."""
T = TypeVar("T")


class Engine(ABC):
    """What ties the workers of runs to the process that started them. Workers get a copy of it in their settings."""

    @abstractmethod
    def put(self, key: str, value: bytes) -> None:
        """Keep `value` under `key` for whoever asks, in place of an earlier one."""

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """Return what is kept under `key`, or None."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Forget what is kept under `key`."""

    @abstractmethod
    def preemption_notice(self) -> str:
        """Return Ray's notice to this worker that nodes will be preempted soon, or an empty text if there is none.

        All workers of a run call this together, as often as each other.
        """

    @abstractmethod
    def train(
        self,
        work: Work,
        settings: dict[str, Any],
        scaling: ray.train.ScalingConfig,
        config: ray.train.RunConfig,
        datasets: Mapping[str, Any],
    ) -> Any:
        """Run `work(settings)` on the workers of `scaling`; return what rank 0 returns.

        The callbacks of `config` are called in this process. Raises `ray.train.TrainingFailedError`.
        """


def make_engine() -> Engine:
    """Return the engine that FASHION_RAY_INTERNALS and the version of Ray allow. Raises `UserError` for a wrong value.

    Ray must be connected.
    """
    if uses_internals():
        from fashion.distributed import ray_internals

        return ray_internals.LeanEngine()
    return PublicEngine()


def uses_internals() -> bool:
    """Return whether runs use `ray_internals`; raises `UserError` for a wrong value of FASHION_RAY_INTERNALS."""
    choice = os.environ.get(SWITCH) or "auto"
    require(choice in ("auto", "no"), f"{SWITCH}={choice} must be auto or no")
    return choice == "auto" and ray.__version__ in TESTED_RAY


def run_config(log_level: str, **arguments: Any) -> ray.train.RunConfig:
    """Return Ray Train's `RunConfig`; Ray before 2.57 takes no level of logging, and logs more."""
    if hasattr(ray.train, "LoggingConfig"):
        arguments["logging_config"] = ray.train.LoggingConfig(log_level=log_level)
    return ray.train.RunConfig(**arguments)


class PublicEngine(Engine):
    """Ray's documented API alone: `TorchTrainer` as it is, whose controller is an actor, and a `Board` beside it."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
        # Decided here for all workers: they call `get_preemption_info` together or not at all.
        is_watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
        self._tells_preemption = is_watched and hasattr(ray.train, "get_preemption_info")
        """Ray 2.59 and later do."""

    def put(self, key: str, value: bytes) -> None:
        ray.get(self._board.put.remote(key, value))

    def get(self, key: str) -> bytes | None:
        return cast(bytes | None, ray.get(self._board.get.remote(key)))

    def delete(self, key: str) -> None:
        ray.get(self._board.delete.remote(key))

    def preemption_notice(self) -> str:
        info = ray.train.get_preemption_info() if self._tells_preemption else None
        return "" if info is None else str(info)

    def train(
        self,
        work: Work,
        settings: dict[str, Any],
        scaling: ray.train.ScalingConfig,
        config: ray.train.RunConfig,
        datasets: Mapping[str, Any],
    ) -> Any:
        os.environ.setdefault(INTERVAL_VARIABLE, str(HEALTH_CHECK_INTERVAL_S))
        run = f"{config.name}-{secrets.token_hex(4)}"
        listener = Listener(self._board, run, config.callbacks)
        trainer = TorchTrainer(
            telling(work, self._board, run),
            train_loop_config=settings,
            torch_config=NetworkConfig(),
            scaling_config=scaling,
            run_config=dataclasses.replace(config, callbacks=[Forwarder(self._board, run)]),
            datasets=dict(datasets),
        )
        with as_ray_handles_signals(), listener:
            trainer.fit()
        return listener.returned


def telling(work: Work, board: Any, run: str) -> Work:
    """Return `work`, of which rank 0 also tells the driver its result: Ray before 2.57 would forget it."""

    def train_loop_per_worker(settings: dict[str, Any]) -> None:
        returned = work(settings)
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(board.tell.remote(run, ("returned", returned)))

    return train_loop_per_worker


class Forwarder(ray.train.UserCallback):  # type: ignore[misc]  # Ray has no types
    """Tells the driver what the controller, in its own process, tells its callbacks, and waits until that is done."""

    def __init__(self, board: Any, run: str) -> None:
        self._board = board
        self._run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        ray.get(self._board.tell.remote(self._run, ("report", metrics)))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # An exception may be of a class that the driver does not know.
        told = {rank: last_line(error) for rank, error in worker_exceptions.items()}
        ray.get(self._board.tell.remote(self._run, ("exception", told)))


class Listener:
    """Context manager: a thread of the driver that calls the callbacks with what a `Forwarder` tells."""

    def __init__(self, board: Any, run: str, callbacks: Sequence[Any]) -> None:
        self.returned: Any = None
        """What rank 0 has returned."""
        self._board = board
        self._run = run
        self._callbacks = callbacks
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> "Listener":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        ray.get(self._board.end.remote(self._run))
        self._thread.join()

    def _listen(self) -> None:
        while (told := ray.get(self._board.next.remote(self._run))) is not None:
            number, event = told
            answer = "the run was stopped"
            try:
                self._handle(*event)
                answer = ""
            except Exception as error:  # raised by the controller, and by `fit`
                answer = f"{type(error).__name__}: {last_line(error)}"
            finally:
                self._board.answer.remote(self._run, number, answer)

    def _handle(self, kind: str, value: Any) -> None:
        if kind == "returned":
            self.returned = value
            return
        for callback in self._callbacks:
            if kind == "report":
                callback.after_report(run_context=None, metrics=value, checkpoint=None)
            else:
                callback.after_exception(run_context=None, worker_exceptions=value)


@contextlib.contextmanager
def as_ray_handles_signals() -> Iterator[None]:
    """Put SIGINT back after a run: in the main thread Ray's trainer takes it, to end its workers, and keeps it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        signal.alarm(0)  # see `run_in_thread`
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def run_in_thread(work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """Run `work` in a thread and return its result, or raise its exception.

    If the wait is interrupted, as by Ctrl-C, calls `stop` and gives `work` `SECONDS_TO_STOP` to end. In the main thread
    Ray would install its own handler of SIGINT and keep it after the run; in another one, Ctrl-C reaches the caller.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:  # raised again in the caller's thread
            done.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        result, error = done.get()
    except BaseException:
        # The exception goes on to the caller once the workers have ended. Ray's handler of SIGTERM sets an alarm that
        # aborts the process after 3 s; to stop the workers and to write the row may take longer.
        signal.alarm(0)
        stop()
        thread.join(SECONDS_TO_STOP)
        raise
    if error is not None:
        raise error
    return cast(T, result)


@dataclass
class NetworkConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's `TorchConfig`, with `NetworkBackend` to set up the process group."""

    @property
    def backend_cls(self) -> type["NetworkBackend"]:
        return NetworkBackend


class NetworkBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Makes every worker choose its network interface before the process group is created.

    It is the one with the node's address in Ray. By default gloo uses the address that the host's own name resolves to.
    Debian and many containers resolve it to 127.0.1.1 or 127.0.0.1; workers on several hosts would then tell each other
    to connect to themselves.
    """

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Set the node's interface for gloo and NCCL in the environment, unless the user has set one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # Without "=" NCCL takes the name as a prefix: eth1 would match eth10.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def interface_of(address: str) -> str | None:
    """Return the interface that has `address`, or None if none has it, as behind network address translation."""
    import psutil  # part of Ray, which makes it importable when Ray is imported

    for name, entries in psutil.net_if_addrs().items():
        # The kernel appends the interface's name to a link-local IPv6 address.
        if address in {entry.address.partition("%")[0] for entry in entries}:
            return str(name)
    return None
