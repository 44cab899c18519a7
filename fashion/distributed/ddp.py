"""Wrap a network in DDP, and choose how ranks exchange gradients."""

from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fashion.distributed.shared_memory import ShardedOptimizer
from fashion.training import run as fit


def wrap_in_ddp(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> fit.WrappedModel:
    """Return `model` under DDP if there is more than one worker, what moves its weights, and the way of gradients.

    No buffers are sent: they are constants, apart from statistics that are averaged once, before an evaluation. With
    bf16 arithmetic gradients are exchanged as bf16 too: half the bytes. On one host's CPUs they go through shared
    memory, in one bucket: nothing could be gained by sending some of them early, for the cores are busy. There, workers
    share out the update as well.
    """
    context = ray.train.get_context()
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "forward_sync_buffers": False}
    shared = None
    if 1 < context.get_world_size() == context.get_local_world_size() and ray.train.torch.get_device().type == "cpu":
        shared = ShardedOptimizer.open(optimizer, torch.bfloat16 if precision == "bf16" else torch.float32)
        if shared is not None:
            options["bucket_cap_mb"] = sum(parameter.nbytes for parameter in model.parameters()) / 2**20 + 1
    prepared: nn.Module = ray.train.torch.prepare_model(model, parallel_strategy_kwargs=options)
    if not isinstance(prepared, DistributedDataParallel):
        return prepared, optimizer.step, "none"
    if shared is not None:
        prepared.register_comm_hook(None, shared.hook)
        return prepared, shared.step, "shared memory"
    if precision == "bf16":
        prepared.register_comm_hook(None, bf16_compress_hook)
    return prepared, optimizer.step, dist.get_backend()
