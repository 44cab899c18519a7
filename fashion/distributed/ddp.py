"""Wrap a network in DistributedDataParallel (DDP), and choose how ranks exchange gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fashion.distributed.shared_memory import ShardedOptimizer
from fashion.model.device import on_side_stream
from fashion.model.eager import without_compiler
from fashion.training.run import WrappedModel


def wrap_in_ddp(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> WrappedModel:
    """Return `model`, under DDP if there are several workers, the function that updates it, and the kind of exchange.

    DDP sends no buffers: they are constants, except for statistics that are averaged once, before an evaluation. With
    bf16 precision ranks send gradients as bf16, half the bytes. On CPUs gradients are averaged in fp32 and in rank
    order, through shared memory as well as through gloo, so that ranks on one host and on several compute the same
    bits. On one host gradients go through shared memory, in one bucket: sending some of them early would gain nothing,
    since the cores are busy. There each worker also updates only its share of the weights.
    """
    import ray.train.torch  # imported here, so that the communication hook below works without Ray

    context, device = ray.train.get_context(), ray.train.torch.get_device()
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "forward_sync_buffers": False}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shared = None
    if 1 < context.get_world_size() == context.get_local_world_size() and device.type == "cpu":
        shared = ShardedOptimizer.open(optimizer, dtype)
        if shared is not None:
            options["bucket_cap_mb"] = sum(parameter.nbytes for parameter in model.parameters()) / 2**20 + 1
    # A CUDA graph of the step can be captured only if DDP was made on another stream than the default one.
    with without_compiler(), on_side_stream(device):
        prepared: nn.Module = ray.train.torch.prepare_model(model, parallel_strategy_kwargs=options)
    if not isinstance(prepared, DistributedDataParallel):
        return prepared, optimizer.step, "none"
    if shared is not None:
        prepared.register_comm_hook(None, shared.hook)
        return prepared, shared.step, "shared memory"
    register_hook(prepared, dist.get_backend(), dtype)
    return prepared, optimizer.step, dist.get_backend()


def register_hook(model: DistributedDataParallel, backend: str, dtype: torch.dtype) -> None:
    """Let `model` exchange gradients as `dtype` through `backend`.

    torch's own hook for bf16 needs NCCL, and DDP refuses it in builds of torch without CUDA.
    """
    if backend == "nccl":
        if dtype == torch.bfloat16:
            model.register_comm_hook(None, bf16_compress_hook)
    else:
        model.register_comm_hook(dtype, mean_in_rank_order)


def mean_in_rank_order(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Average gradients over the ranks: a DDP communication hook that sends `dtype` and adds in fp32, in rank order.

    The result has the same bits as `ShardedOptimizer`'s, for any number of ranks. gloo's own all-reduce adds in the
    order of its ring, and in bf16 if it sends bf16. Each rank averages one slice of the bucket and sends the mean to
    all others, as a ring all-reduce does: each rank sends 2 (W - 1) / W of the bucket's bytes with fp32, and three
    quarters of that with bf16.
    """
    gradient, world_size = bucket.buffer(), dist.get_world_size()
    per_rank = -(-gradient.numel() // world_size)
    sent = gradient.new_zeros(world_size * per_rank, dtype=dtype)
    sent[: gradient.numel()].copy_(gradient)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    first, *others = received.view(world_size, per_rank)
    mean = first.float()
    for each in others:
        mean.add_(each)
    mean.mul_(1.0 / world_size)
    means = gradient.new_empty(world_size * per_rank)
    dist.all_gather_into_tensor(means, mean)
    gradient.copy_(means[: gradient.numel()])
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradient)
    return done
