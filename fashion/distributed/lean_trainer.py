"""Ray's `TorchTrainer` with no more processes than it needs: on two cores each one takes 3 to 8 s to start.

Ray 2.60 starts beside the workers a controller, a coordinator of autoscaling, a manager of datasets and a cleaner of
placement groups, one after the other. Only the workers, and the actor that they meet at, are left here. What is
overridden is not public; the version of Ray is pinned, and a test counts the processes.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR, HEALTH_CHECK_INTERVAL_S_ENV_VAR
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from fashion.distributed.interfaces import NetworkConfig

# The controller looks at its workers this often (Ray's default is 2 s); each epoch's report waits for a look.
HEALTH_CHECK_INTERVAL_S = 0.5
CONTROLLERS_OWN = (HEALTH_CHECK_INTERVAL_S_ENV_VAR, ENABLE_PREEMPTION_WATCHER_ENV_VAR)


class FixedWidth(FixedScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """A fixed number of workers, asked of the placement group alone: no autoscaler is told beforehand.

    The plan has found room for them in the live cluster; a pending placement group makes an autoscaler act as well.
    """

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class Workers(WorkerGroup):  # type: ignore[misc]
    """Workers that are told of no controller actor, since the controller is none.

    They would only ask it for the checkpoints that all of them reported, and the training loop never does.
    """

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        """Leave out what the controller alone reads: without variables of their own, workers take waiting processes."""
        environment = dict(WorkerGroup._get_worker_runtime_env(custom_runtime_env))
        variables = {key: value for key, value in environment.pop("env_vars").items() if key not in CONTROLLERS_OWN}
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
        told = []
        for rank, worker in enumerate(workers):
            own = {name: values[rank] for name, values in train_context_args.items()}
            told.append(
                worker.actor.init_train_context.remote(distributed_context=worker.distributed_context, **shared, **own)
            )
        ray.get(told)
        self._decorate_worker_log_file_paths(workers)


class Controller(TrainController):  # type: ignore[misc]
    """Ray Train's controller, for a process that is no actor."""

    worker_group_cls = Workers

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if HEALTH_CHECK_INTERVAL_S_ENV_VAR not in os.environ:
            self._health_check_interval_s = HEALTH_CHECK_INTERVAL_S


def reclaim_announced() -> str:
    """Return what this worker was told of nodes that will be taken away soon, an empty text if nothing.

    Ray's own `get_preemption_info` makes all workers wait for each other, who agree on a checkpoint by themselves.
    """
    told = get_train_context().preemption_context.preemption_info
    return "" if told is None else str(told)


class LeanTrainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` whose controller runs in the calling process.

    Callbacks are therefore called here, as they are and not as copies. No actor removes the placement group later:
    that of a run goes with its driver, that of a trial with `trial.remove_workers`; Ray's own takes 0.6 GB, and stays
    for ever where no dashboard answers it or another Ray runs on the machine.
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
        self.run_config.callbacks = []  # `arguments` has them; workers are sent the rest
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
        """End the workers, from another thread than that of `fit`, which then raises `asyncio.CancelledError`."""
        self._cancel()
