"""The exponential moving average (EMA) of a network's weights, which is evaluated in place of the weights."""

import copy
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def start_ema(model: Network) -> Network:
    """Return a copy of `model` for `update_ema`, on the same device, with weights that take no gradients.

    The copy shares the buffers of `model`: it uses the network's running statistics of batch normalisation, as torch's
    `AveragedModel` does by default. They are moving averages already; averaged once more, they would be further state
    that differs between ranks within an epoch. They fit the average better the less the weights change, so best at the
    end of a one-cycle schedule.
    """
    own = {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, own).requires_grad_(False)


def ema_decay_at(step: int, decay: float) -> float:
    """Return the decay after `step`, counted from 1 over the whole run: (1 + step) / (10 + step), at most `decay`.

    Early in a run the average then covers about a tenth of the steps so far, and soon forgets the initial weights,
    which are random; with `decay` alone they would keep a weight of decay^step. The formula is that of TensorFlow's
    `ExponentialMovingAverage` with `num_updates`. It depends on the step alone, so a resumed run restores no further
    state.
    """
    return min(decay, (1.0 + step) / (10.0 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Update `ema`, in place, after `step`: ema = ema * d + model * (1 - d), where d is `ema_decay_at`.

    Ranks have the same weights after a step, so they compute the same average without exchanging anything. torch's
    `AveragedModel` is not used: it would copy its count of steps from the GPU in every step.
    """
    share = 1.0 - ema_decay_at(step, decay)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), share)
