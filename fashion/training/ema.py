"""The moving average of a network's weights, which is evaluated in their place. Knows torch alone."""

import copy
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def start_ema(model: Network) -> Network:
    """Return what `update_ema` moves: at the start the weights of `model`, on its device, and no optimizer's.

    Buffers are those of `model` itself: the average has the network's running statistics of batch normalisation, as
    torch's `AveragedModel` has them by default. They are moving averages already, and averaged once more they would be
    a further state that differs between ranks within an epoch. They fit the better the slower the weights move, that
    is best at the end of a one-cycle schedule.
    """
    own = {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, own).requires_grad_(False)


def ema_decay_at(step: int, decay: float) -> float:
    """Return the share of the average that stays at `step`, counted from 1 over the whole run; at most `decay`.

    (1 + step) / (10 + step) as long as that is less: the average then reaches back over about a tenth of the steps so
    far, and the weights of the start, which are junk, are soon gone; with `decay` alone they would weigh decay^step.
    The formula is that of TensorFlow's `ExponentialMovingAverage` with `num_updates`. It needs the step alone, so a
    resumed run has no further state to restore.
    """
    return min(decay, (1.0 + step) / (10.0 + step))


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move `average` towards `model` after the update `step`: average * d + model * (1 - d) with d of `decay_at`.

    In place, all tensors in one call. Ranks have the same weights after a step, so they get the same average, and
    nothing is exchanged. torch's `AveragedModel` would copy its count of steps from a GPU in each of them.
    """
    share = 1.0 - ema_decay_at(step, decay)
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)
