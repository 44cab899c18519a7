"""Optimizers and the learning-rate schedule: torch's optimizers, and Muon for convolutions with AdamW for the rest."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fashion.config import TrainConfig
from fashion.model.eager import leave_compiler_out
from fashion.model.network import LearnedConv2d

# Momentum of SGD and of Muon.
MOMENTUM = 0.9
# Muon's learning rate over AdamW's: Muon's customary 0.02, with 1.5e-3 for the other parameters, chosen on val.
LR_RATIO = 0.02 / 1.5e-3
# Coefficients of the quintic iteration, and its number of steps: Jordan et al. 2024, "Muon: an optimizer for hidden
# layers".
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Rows that are orthogonalised together. The work grows with their square: as one matrix, the widest convolution (256
# filters) took twice as long as all others together; as two halves it takes two fifths of that.
BLOCK_ROWS = 128


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return approximately the semi-orthogonal matrix nearest to `matrix` (m, n): same singular vectors, values near 1.

    A batch (b, m, n) is that many matrices; those padded with zeros are orthogonalised as if they were not.

    Newton-Schulz iteration: each step multiplies X by a polynomial P of the Gram matrix G = X X^T, and the next Gram
    matrix is P G P. So this multiplies the polynomials first, all of them m x m, and X once at the end: about half the
    work for a convolution (m = 128, n = 1152), and the same result up to rounding.
    """
    a, b, c = NEWTON_SCHULZ
    is_batch, is_tall = matrix.ndim == 3, matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if is_tall else matrix
    # One matrix by the kernels of one: a batch of one would have other bits.
    x: Tensor = wide / ((torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True) if is_batch else wide.norm()) + 1e-7)
    gram = x @ x.mT
    product = None
    for step in range(NEWTON_SCHULZ_STEPS):
        polynomial = (torch.baddbmm if is_batch else torch.addmm)(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = polynomial @ gram @ polynomial
    assert product is not None
    x = product @ x
    return x.mT if is_tall else x


def orthogonalised_together(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return `orthogonalised` of the blocks of `weights` (out, in, 3, 3), in the shapes of `weights`.

    All blocks are padded with zeros to the largest one and are one batch, so that a GPU gets about 30 operations in
    place of 30 for each block. The padding multiplies the arithmetic, which a GPU has to spare and a CPU does not.
    """
    blocks = [block for weight in weights for block in torch.split(weight, BLOCK_ROWS)]
    height, width = max(len(block) for block in blocks), max(block[0].numel() for block in blocks)
    # A matrix with more rows than columns would be transposed by itself, but not in a batch that is wider.
    assert all(len(block) <= block[0].numel() for block in blocks), "filters have more weights than a block has filters"
    padded = blocks[0].new_zeros(len(blocks), height, width)
    torch._foreach_copy_([inside(part, block) for part, block in zip(padded, blocks, strict=True)], blocks)
    parts = iter(orthogonalised(padded))
    return [
        joined([inside(next(parts), block) for block in torch.split(weight, BLOCK_ROWS)], weight) for weight in weights
    ]


def inside(padded: Tensor, block: Tensor) -> Tensor:
    """Return the view of `padded` (height, width) that holds the rows and columns of `block`, in the block's shape."""
    return padded[: len(block), : block[0].numel()].view(block.shape)


def joined(blocks: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return the blocks of a weight as one tensor in its shape, without a copy if there is one block."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks)).view(weight.shape)


class Muon(torch.optim.AdamW):
    """AdamW, except that groups with `muon: True` are updated by Muon: along their orthogonalised Nesterov momentum.

    A convolution's weight (out, in, 3, 3) is taken as a matrix (out, in * 9), in blocks of up to `BLOCK_ROWS` filters.
    A block's update has singular values near `LR_RATIO` times the learning rate, so that one learning rate serves both
    kinds of parameters. On CPUs each block is orthogonalised by itself; elsewhere all of a group are, in one batch.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all groups; sets the gradients of Muon's groups to None. `closure` must be None."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            if not group.get("muon"):
                continue
            if group["params"] and group["params"][0].device.type != "cpu":
                self._update_together(group["params"], group["lr"], group["weight_decay"])
            else:
                for weight in group["params"]:
                    self._update(weight, group["lr"], group["weight_decay"])
            for weight in group["params"]:
                weight.grad = None  # AdamW's step, which follows, skips weights without a gradient
        return super().step()

    def _start_state(self, weight: Tensor) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            state["step"] = torch.zeros((), device=weight.device)  # AdamW's `load_state_dict` expects a count of steps
            state["momentum"] = torch.zeros_like(weight)

    def _update_together(self, weights: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        """Do to all weights what `_update` does to one, in few operations, each over all of them.

        `lr` may be a tensor () on the device: a captured graph reads it anew in each step.
        """
        for weight in weights:
            self._start_state(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        assert len(gradients) == len(weights), "every convolution takes part in every step"
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_add_([self.state[weight]["step"] for weight in weights], 1)
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, gradients)
        updates = orthogonalised_together(torch._foreach_add(gradients, momenta, alpha=MOMENTUM))
        torch._foreach_mul_(weights, 1 - LR_RATIO * lr * weight_decay)
        torch._foreach_mul_(updates, -LR_RATIO * lr)
        torch._foreach_add_(weights, updates)

    def _update(self, weight: Tensor, lr: float, weight_decay: float) -> None:
        gradient = weight.grad
        assert gradient is not None, "every convolution takes part in every step"
        self._start_state(weight)
        state = self.state[weight]
        state["step"] += 1
        momentum: Tensor = state["momentum"]
        momentum.mul_(MOMENTUM).add_(gradient)
        ahead = gradient.add(momentum, alpha=MOMENTUM).reshape(weight.shape[0], -1)
        blocks = torch.split(ahead, BLOCK_ROWS)
        update = torch.cat([orthogonalised(block) for block in blocks]).reshape(weight.shape)
        weight.mul_(1 - LR_RATIO * lr * weight_decay)
        weight.add_(update, alpha=-LR_RATIO * lr)


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of `config`; each parameter group holds its peak learning rate as `peak_lr`.

    The factors of learned padding are a group of their own without weight decay, which would pull them to 0; they start
    at 1.
    """
    leave_compiler_out()
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    factors = [layer.border for layer in model.modules() if isinstance(layer, LearnedConv2d)]
    undecayed = [{"params": factors, "peak_lr": config.lr, "weight_decay": 0.0}] if factors else []
    decayed: dict[str, Any] = {"params": without(factors, model.parameters()), "peak_lr": config.lr}
    if config.optimizer == "sgd":
        return torch.optim.SGD([decayed, *undecayed], momentum=MOMENTUM, nesterov=True, **options)
    if config.optimizer != "muon":
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return kind([decayed, *undecayed], **options)
    # The first convolution has one input channel, so its weight is a matrix of 32 x 9: nothing to orthogonalise.
    matrices = [parameter for parameter in decayed["params"] if parameter.ndim == 4 and parameter.shape[1] > 1]
    return Muon(
        [
            decayed | {"params": without(matrices, decayed["params"]), "muon": False},
            decayed | {"params": matrices, "muon": True},
            *undecayed,
        ],
        **options,
    )


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let the update be captured in a CUDA graph: learning rates become tensors on `device`, read anew in each step.

    torch keeps the counts of steps on the device as well, since the optimizers are fused. Call this before the first
    step.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's learning rate to `factor` times its peak; return that of the first group."""
    for group in optimizer.param_groups:
        value = group["peak_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
    return float(optimizer.param_groups[0]["peak_lr"] * factor)


def without(excluded: Sequence[nn.Parameter], parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return `parameters` without those in `excluded`, compared by identity: `==` compares elements."""
    ids = {id(parameter) for parameter in excluded}
    return [parameter for parameter in parameters if id(parameter) not in ids]


def state_names(optimizer: torch.optim.Optimizer) -> list[dict[str, bool]]:
    """Return, for each parameter group, the state that `optimizer` keeps of a parameter.

    That is name -> whether the state has the parameter's shape; otherwise it is a single number. Found by one step of
    an optimizer of the same class on parameters of one element.
    """
    # On the CPU, whatever `make_capturable` has set.
    on_cpu = {"lr": 1e-3} | ({"capturable": False} if "capturable" in optimizer.defaults else {})
    groups = [
        group | {"params": [torch.zeros([1] * group["params"][0].ndim)]} | on_cpu for group in optimizer.param_groups
    ]
    for group in groups:
        group["params"][0].grad = torch.zeros_like(group["params"][0])
    probe = type(optimizer)(groups)  # type: ignore[call-arg]  # all kinds have defaults for what groups bring
    probe.step()
    return [
        {name: value.ndim > 0 for name, value in probe.state[group["params"][0]].items()}
        for group in probe.param_groups
    ]


def learning_rate(schedule: str, peak: float, warmup_fraction: float, step: int, total_steps: int) -> float:
    """Return the learning rate of `step` (0-based) of `total_steps`.

    `one-cycle` rises along a cosine from peak / 25 to the peak at `warmup_fraction`, then falls along a cosine to
    nearly 0 (Smith and Topin 2017, arXiv 1708.07120; the two phases and constants of torch's OneCycleLR). It is a pure
    function of the step, so a resumed run needs no schedule state.
    """
    if schedule == "constant":
        return peak
    start, end = peak / 25.0, peak / 25.0 / 1e4
    top = warmup_fraction * total_steps - 1.0
    last = total_steps - 1.0
    if step <= top:
        low, share = start, 1.0 - step / top if top > 0 else 0.0
    else:
        low, share = end, (step - top) / max(last - top, 1.0)
    return low + (peak - low) / 2.0 * (1.0 + math.cos(math.pi * share))
