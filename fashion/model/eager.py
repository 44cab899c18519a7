"""Keep torch's compiler out of processes that compile nothing, as all of this project's training does.

torch 2.15 imports `torch._dynamo`, and with it SymPy, Triton and FSDP, when a process first builds an optimizer or
wraps a network in DDP: only to tell a compiler that is not running to leave these functions alone. That takes about
half as long as all else that a training process imports. Here the functions lose what torch put around them for the
compiler, and compute what they did. A process that has imported the compiler already stays as it is.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

COMPILER = "torch._dynamo"
METHODS = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
DDP_MODE = "ddp_optimizer"
"""What the compiler's own settings say about DDP by default; of interest to code that is compiled alone."""


def leave_compiler_out() -> None:
    """Take what torch put around its optimizers and DDP for the compiler off them, for all of this process.

    Call this before the first optimizer is built. Later calls do nothing.
    """
    if COMPILER in sys.modules or not hasattr(Optimizer.add_param_group, "__wrapped__"):
        return
    for name in METHODS:
        setattr(Optimizer, name, plain(getattr(Optimizer, name), 1))
    for kind in (SGD, Adam):  # AdamW and Muon inherit from Adam
        kind.step = torch.no_grad()(plain(kind.step, 1))  # type: ignore[method-assign]
    forward: Any = DistributedDataParallel
    forward._inside_ddp_forward = contextmanager(plain(forward._inside_ddp_forward, 2))


def plain(function: Any, depth: int) -> Any:
    """Return what lies under `depth` decorators of `function`."""
    for _ in range(depth):
        function = function.__wrapped__
    return function


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, `DistributedDataParallel(...)` gets the compiler's setting about DDP without the compiler."""
    if COMPILER in sys.modules:
        yield
        return
    settings = SimpleNamespace(utils=SimpleNamespace(get_optimize_ddp_mode=lambda: DDP_MODE))
    vars(torch)["_dynamo"] = settings
    try:
        yield
    finally:
        if vars(torch).get("_dynamo") is settings:
            del vars(torch)["_dynamo"]
