"""The rows of `jobs.bench` as figures: sides that take turns, their ratio, the operations of a step. Without Ray."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fashion.config import IMAGE_SIZE
from fashion.reports import provenance

Rates = dict[str, list[float]]
"""Per side of a comparison, its rate in each repeat."""


@dataclass(frozen=True)
class Measurement:
    """One row: rates of both sides per repeat, in `unit`, and the ratio that is aimed at; 0 where none is."""

    row: str
    unit: str
    ours: list[float]
    reference: list[float]
    target: float
    threads: int

    def columns(self) -> dict[str, Any]:
        """Return the row of the `bench` table; the ratio is the median of the repeats' own ratios."""
        ratios = [ours / reference for ours, reference in zip(self.ours, self.reference, strict=True)]
        ratio = statistics.median(ratios)
        return {
            "row": self.row,
            "ours": statistics.median(self.ours),
            "reference": statistics.median(self.reference),
            "unit": self.unit,
            "ratio": ratio,
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "repeats": len(ratios),
            "target": self.target or None,
            "met": ratio >= self.target if self.target else None,
            "hardware": provenance.hardware(),
            "threads": self.threads,
            "source_hash": provenance.source_hash(),
        } | provenance.versions()


def inverse(seconds: list[float]) -> list[float]:
    """Turn durations into rates per hour, so that more is better."""
    return [3600 / each for each in seconds]


def alternate(sides: Mapping[str, Callable[[int], float]], repeats: int) -> Rates:
    """Let the sides take turns; return each one's rates. `side(repeat)` gives a rate; the first of each warms up."""
    rates: Rates = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            rates[name].append(side(repeat))
    return {name: values[1:] for name, values in rates.items()}


def step_flops(model: nn.Module) -> int:
    """Return the floating-point operations, multiplications and additions, of a training step for one image.

    An output of a convolution or a linear layer is a product of one filter, or one row of weights, with as many inputs:
    2 x (numbers in it) operations. The gradients of the layer's weights and of its inputs take as many each, the latter
    not in the first layer (Goodfellow et al. 2016, Deep Learning, section 6.5). What has no products (ReLU, pooling,
    the loss) is left out, as it is in `torch.utils.flop_counter`; a test compares the two.
    """
    layers: list[int] = []

    def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        weight: Any = layer.weight
        layers.append(2 * output.numel() * weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    device = next(model.parameters()).device
    with torch.no_grad():
        model(torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device=device))
    for hook in hooks:
        hook.remove()
    return 3 * sum(layers) - layers[0]
