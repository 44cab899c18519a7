"""The moving average of the weights: the recurrence that it is said to be, and nothing of the start that stays."""

import pytest
import torch
from torch import nn

from fashion.model.network import FashionCNN
from fashion.training.ema import ema_decay_at, start_ema, update_ema

STEPS = 40


def values_of(network: nn.Module) -> torch.Tensor:
    """Return all weights in one row of float64."""
    return torch.cat([parameter.detach().double().flatten() for parameter in network.parameters()])


class Small(nn.Module):
    """Parameters of several shapes and a batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).flatten(1))


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 1, 4, 4)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.999])
def test_the_average_is_the_recurrence_by_hand(decay: float) -> None:
    torch.manual_seed(0)
    model = Small()
    ema = start_ema(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = values_of(model)
    for step in range(1, STEPS + 1):
        update(model, optimizer)
        update_ema(ema, model, decay, step)
        share = min(decay, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * values_of(model)
        assert torch.allclose(values_of(ema), expected, atol=1e-6), step
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_average_has_the_latest_statistics_of_the_network_and_leaves_them_alone() -> None:
    """Also those that are read from a checkpoint later on."""
    torch.manual_seed(0)
    model, other = Small(), Small()
    ema = start_ema(model)
    update(model, torch.optim.SGD(model.parameters(), lr=0.1))
    update_ema(ema, model, 0.5, 1)
    assert model.norm.running_mean.abs().min() > 0
    for network in (model, other):
        model.load_state_dict(network.state_dict())
        expected = {name: value.clone() for name, value in network.named_buffers()}
        ema.eval()(torch.randn(8, 1, 4, 4))
        assert all(torch.equal(value, expected[name]) for name, value in ema.named_buffers())


def test_the_share_that_stays_rises_to_the_decay() -> None:
    shares = [ema_decay_at(step, 0.99) for step in range(1, 2000)]
    assert shares[0] == pytest.approx(2 / 11)
    assert shares == sorted(shares)
    assert set(shares[890:]) == {0.99}
    assert shares[880] < 0.99


@pytest.mark.parametrize("decay", [0.99, 0.9999])
def test_what_the_network_began_with_is_gone_after_the_first_steps(decay: float) -> None:
    """A weight that was 1 at first and is 0 after every step: what is left of it in the average."""
    model = nn.Linear(1, 1)
    ema = start_ema(model)
    with torch.no_grad():
        for tensor, value in ((ema.weight, 1.0), (model.weight, 0.0)):
            tensor.fill_(value)
    for step in range(1, 51):
        update_ema(ema, model, decay, step)
    assert 0 < ema.weight.item() < 1e-5


def test_an_average_lies_in_memory_as_the_network_does() -> None:
    """Else each step of the average would read and write in different orders."""
    model = FashionCNN(pixel_mean=0.3, pixel_std=0.35).to(memory_format=torch.channels_last)
    ema = start_ema(model)
    strides = [[each.stride() for each in network.parameters()] for network in (model, ema)]
    assert strides[0] == strides[1]
    assert ema.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert ema.conv2.weight.data_ptr() != model.conv2.weight.data_ptr()
