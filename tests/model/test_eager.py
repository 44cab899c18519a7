"""Training without torch's compiler: it is not imported, and every number is what it would be with it."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

# Optimizers and DDP are set up anew, as torch made them, for the second half.
TRAIN = """
import hashlib, sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

from fashion.config import TrainConfig
from fashion.model import eager
from fashion.training.optimizer import build_optimizer

places = [(Optimizer, name) for name in eager.METHODS] + [(kind, "step") for kind in (SGD, Adam)]
places.append((DistributedDataParallel, "_inside_ddp_forward"))
as_torch_made_them = [(kind, name, vars(kind)[name]) for kind, name in places]
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)

def train(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    optimizer = build_optimizer(TrainConfig(optimizer=name, lr=0.01), model)
    with eager.without_compiler():
        wrapped = DistributedDataParallel(model)
    for step in range(4):
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
        F.cross_entropy(wrapped(torch.randn(5, 2, 4, 4)), torch.arange(5) % 3).backward()
        optimizer.step()
        assert not any(parameter.grad is not None and parameter.grad.requires_grad for parameter in model.parameters())
        optimizer.zero_grad()
    state = [kept[key] for kept in optimizer.state_dict()["state"].values() for key in sorted(kept)]
    return [tensor.tolist() for tensor in (*model.parameters(), *state)]

names = ("sgd", "adam", "adamw", "muon")
without = [train(name) for name in names]
assert eager.COMPILER not in sys.modules, "the compiler was imported"
for kind, name, function in as_torch_made_them:
    setattr(kind, name, function)
import torch._dynamo
assert [train(name) for name in names] == without, "other numbers"
assert torch._dynamo.utils.get_optimize_ddp_mode() == eager.DDP_MODE
print(len(without))
"""


def test_training_imports_no_compiler_and_computes_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4\n"
