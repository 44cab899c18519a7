"""What overrides or imports private parts of Ray, all of it: see `trainers`, which does the same without it.

It is Ray's `TorchTrainer` without the processes that a run does not need: on two cores each takes 3 to 8 s to start.
Besides the workers Ray 2.60 starts a controller, an autoscaling coordinator, a dataset manager and a cleaner of
placement groups, one after the other. This trainer starts the workers and their synchronisation actor only; a test
counts the processes.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import ray
import ray.train
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR, HEALTH_CHECK_INTERVAL_S_ENV_VAR
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from fashion.distributed.trainers import HEALTH_CHECK_INTERVAL_S, Engine, NetworkConfig, Work, run_in_thread

CONTROLLER_VARIABLES = (HEALTH_CHECK_INTERVAL_S_ENV_VAR, ENABLE_PREEMPTION_WATCHER_ENV_VAR)


class FixedWidth(FixedScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """A fixed number of workers, requested by their placement group alone and not from the autoscaler beforehand.

    The plan has found room for them in the live cluster; an autoscaler also acts on a pending placement group.
    """

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class Workers(WorkerGroup):  # type: ignore[misc]
    """Workers without a handle to a controller actor, since the controller is not an actor.

    Workers use the handle only to get all reported checkpoints, which the training loop never does.
    """

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        """Leave out the controller's variables: only workers without any variables use Ray's prestarted processes."""
        environment = dict(WorkerGroup._get_worker_runtime_env(custom_runtime_env))
        variables = {
            key: value for key, value in environment.pop("env_vars").items() if key not in CONTROLLER_VARIABLES
        }
        return environment | ({"env_vars": variables} if variables else {})

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        shared = {
            "train_run_context": self._train_run_context,
            "synchronization_actor": sync_actor,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "controller_actor": None,
        }
        calls = []
        for rank, worker in enumerate(workers):
            own = {name: values[rank] for name, values in train_context_args.items()}
            calls.append(
                worker.actor.init_train_context.remote(distributed_context=worker.distributed_context, **shared, **own)
            )
        ray.get(calls)
        self._decorate_worker_log_file_paths(workers)


class Controller(TrainController):  # type: ignore[misc]
    """Ray Train's controller, for a process that is not an actor."""

    worker_group_cls = Workers

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if HEALTH_CHECK_INTERVAL_S_ENV_VAR not in os.environ:
            self._health_check_interval_s = HEALTH_CHECK_INTERVAL_S


class LeanTrainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` whose controller runs in the calling process.

    Callbacks are therefore called in this process, and not as copies. No actor removes the placement group afterwards:
    that of a run ends with its driver, and `trial.remove_workers` removes that of a trial. Ray's actor for this takes
    0.6 GB, and stays for ever if no dashboard answers it or another Ray runs on the machine.
    """

    _cancel: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(self, train_loop_per_worker: Callable[[dict[str, Any]], Any], **arguments: Any) -> None:
        super().__init__(train_loop_per_worker, **({"torch_config": NetworkConfig()} | arguments))

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = (
            (PlacementGroupCleanerCallback,) if self.datasets else (PlacementGroupCleanerCallback, DatasetsCallback)
        )
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unneeded)]

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        if not self.scaling_config.elasticity_enabled and not self.datasets:
            arguments["scaling_policy"] = FixedWidth(self.scaling_config)
        self.run_config.callbacks = []  # `arguments` holds them; the rest of the configuration is sent to the workers
        controller = Controller(**arguments)
        asyncio.run(self._drive(controller))
        return controller.get_result()

    async def _drive(self, controller: Controller) -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            await controller.run()
        except asyncio.CancelledError:
            group = controller.get_worker_group()
            if group is not None:
                group.abort()
            raise

    def stop(self) -> None:
        """End the workers; call this from another thread than `fit`, which then raises `asyncio.CancelledError`."""
        self._cancel()


class LeanEngine(Engine):
    """`LeanTrainer`, and Ray's key-value store in place of an actor: neither needs a further process."""

    def put(self, key: str, value: bytes) -> None:
        _internal_kv_put(f"fashion/{key}".encode(), value, overwrite=True)

    def get(self, key: str) -> bytes | None:
        return cast(bytes | None, _internal_kv_get(f"fashion/{key}".encode()))

    def delete(self, key: str) -> None:
        _internal_kv_del(f"fashion/{key}".encode())

    def preemption_notice(self) -> str:
        # Ray's own `get_preemption_info` makes all workers wait for each other; what this worker was told is enough,
        # because the ranks agree on a checkpoint anyway.
        info = get_train_context().preemption_context.preemption_info
        return "" if info is None else str(info)

    def train(
        self,
        work: Work,
        settings: dict[str, Any],
        scaling: ray.train.ScalingConfig,
        config: ray.train.RunConfig,
        datasets: Mapping[str, Any],
    ) -> Any:
        trainer = LeanTrainer(
            work, train_loop_config=settings, scaling_config=scaling, run_config=config, datasets=dict(datasets)
        )
        if threading.current_thread() is threading.main_thread():
            return run_in_thread(trainer.fit, trainer.stop).return_value
        return trainer.fit().return_value
