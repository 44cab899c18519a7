"""The loop: sums equal a reference, randomness is keyed, schedules are tables, divergence is noticed."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fashion.config import TrainConfig, UserError
from fashion.model.network import LearnedConv2d
from fashion.training import loop, sync
from fashion.training.batches import (
    Augmentation,
    Batch,
    plain_batches,
    shuffled_batches,
    stream_seed,
)
from fashion.training.optimizer import (
    BLOCK_ROWS,
    NEWTON_SCHULZ,
    NEWTON_SCHULZ_STEPS,
    Muon,
    build_optimizer,
    learning_rate,
    orthogonalised,
)

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """A linear classifier of raw images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(784, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.float().flatten(1) / 255)


@pytest.fixture
def rows() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (103, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (103,), generator=generator)


def train(model: nn.Module, batches: list[Batch], lr: float = 0.01, label_smoothing: float = 0.0) -> loop.EpochResult:
    """Train one epoch as a run does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    record = loop.EpochRecord(1, CPU)
    for batch in record.timed(batches):
        loop.train_step(model, batch, optimizer.step, record, precision="fp32", label_smoothing=label_smoothing)
        if record.is_sync_point():
            record.synchronise(wants_save=False)
    record.synchronise(wants_save=False)
    return record.result()


@pytest.mark.parametrize("batch_size", [1, 10, 50, 103, 500])
def test_evaluation_does_not_depend_on_how_rows_are_batched(rows: Batch, batch_size: int) -> None:
    model = Tiny()
    sums = loop.evaluate(model, plain_batches(*rows, batch_size), precision="fp32", device=CPU)
    with torch.no_grad():
        logits = model(rows[0]).numpy().astype(np.float64)
    labels = rows[1].numpy()
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert sums.num_rows == 103
    assert sums.num_correct == (logits.argmax(1) == labels).sum()
    assert sums.loss == pytest.approx(-log_softmax[np.arange(103), labels].mean(), rel=1e-6)


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_logits_are_the_mean_over_an_image_and_its_mirror_image(rows: Batch, tta: str) -> None:
    model = Tiny()
    one, other = model(rows[0]), model(rows[0].flip(-1))
    expected = (one + other) / 2 if tta == "flip" else one
    assert torch.equal(loop.classify(model, rows[0], precision="fp32", device=CPU, tta=tta), expected)
    sums = loop.evaluate(model, [rows], precision="fp32", device=CPU, tta=tta)
    assert sums.loss == pytest.approx(F.cross_entropy(expected, rows[1]).item(), rel=1e-5)
    assert sums.num_correct == (expected.argmax(1) == rows[1]).sum()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flipped_rows_evaluate_alike_to_the_bit_where_both_views_are_averaged(rows: Batch, precision: str) -> None:
    mirrored = rows[0].flip(-1), rows[1]
    found = {
        tta: [
            loop.evaluate(Tiny(), plain_batches(*each, 50), precision=precision, device=CPU, tta=tta)
            for each in (rows, mirrored)
        ]
        for tta in ("flip", "none")
    }
    assert found["flip"][0] == found["flip"][1]
    assert found["none"][0] != found["none"][1]


def test_training_sums_count_the_rows_seen(rows: Batch) -> None:
    result = train(Tiny(), list(plain_batches(*rows, 25)))
    assert result.sums.num_rows == 103
    assert 0 <= result.data_wait_s <= result.time_s


def test_training_learns(rows: Batch) -> None:
    model = Tiny()
    losses = [train(model, list(plain_batches(*rows, 25)), lr=0.1).sums.loss for _ in range(20)]
    assert losses[-1] < losses[0] / 2


def test_label_smoothing_changes_the_step_and_not_the_reported_loss(rows: Batch) -> None:
    batch = [(rows[0], rows[1])]
    plain, smooth = Tiny(), Tiny()
    told = []
    for model, smoothing in ((plain, 0.0), (smooth, 0.2)):
        told.append(train(model, batch, lr=0.1, label_smoothing=smoothing).sums.loss)
    assert told[0] == told[1]
    assert not torch.equal(plain.fc.weight, smooth.fc.weight)


@pytest.mark.parametrize("bad_step", [1, 7, 50, 51])
def test_a_loss_that_is_not_finite_is_named_by_epoch_and_step(bad_step: int) -> None:
    class Bad(Tiny):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(images) * (math.nan if self.calls >= bad_step else 1.0)

    batches = [(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))] * 60
    with pytest.raises(sync.Diverged, match=rf"epoch 1, step {bad_step};"):
        train(Bad(), batches)


# --- order and augmentation ---------------------------------------------------------------------------------------


def batches_of(rows: Batch, *, seed: int = 0, epoch: int = 1, rank: int = 0, **augmentation: object) -> list:
    return list(
        shuffled_batches(
            *rows,
            batch_size=20,
            num_steps=5,
            augmentation=Augmentation(**augmentation),
            seed=seed,
            epoch=epoch,
            rank=rank,
        )
    )


def same(one: list, two: list) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(("step_s", "steps"), [(0.001, 10), (0.2, 2), (7.0, 1)])
def test_looks_at_slow_steps_come_sooner(monkeypatch: pytest.MonkeyPatch, step_s: float, steps: int) -> None:
    """A run is saved at a look, so that one that may lose two seconds must not wait seven for the next."""
    now = [0.0]
    monkeypatch.setattr("fashion.training.sync.time.perf_counter", lambda: now[0])
    sync_points = sync.SyncPoints(1, 40, torch.device("cpu"))
    due = []
    for step in range(41, 62):
        now[0] += step_s
        if sync_points.is_due_after(step):
            due.append(step)
            assert sync_points.synchronise(step, wants_save=False) == (False, False)
    assert due == list(range(41, 62, steps))
    assert sync_points.synchronise(62, wants_save=False, is_writing=True) == (False, True)
    assert sync_points.synchronise(63, wants_save=True) == (True, False)


def test_order_is_keyed_by_seed_epoch_and_rank(rows: Batch) -> None:
    first = batches_of(rows, flip="random", shift=2)
    assert same(first, batches_of(rows, flip="random", shift=2))
    for other in ({"seed": 1}, {"epoch": 2}, {"rank": 1}):
        assert not same(first, batches_of(rows, flip="random", shift=2, **other))


def test_an_epoch_shows_each_row_at_most_once() -> None:
    images = torch.zeros(103, 1, 28, 28, dtype=torch.uint8)
    seen = [int(label) for _, labels in batches_of((images, torch.arange(103))) for label in labels]
    assert len(seen) == len(set(seen)) == 100


def test_flips_mirror_about_half_of_the_rows() -> None:
    images = torch.arange(28, dtype=torch.uint8).expand(1000, 1, 28, 28).contiguous()
    generator = torch.Generator().manual_seed(0)
    for flip in ("random", "alternating"):
        out = Augmentation(flip).apply(images, torch.arange(1000), seed=0, epoch=1, generator=generator)
        mirrored = out[:, 0, 0, 0] == 27
        assert 400 < int(mirrored.sum()) < 600
        assert torch.equal(out[mirrored], images[mirrored].flip(-1))
        assert torch.equal(out[~mirrored], images[~mirrored])


def test_alternating_flips_turn_every_row_in_every_epoch() -> None:
    images = torch.arange(28, dtype=torch.uint8).expand(200, 1, 28, 28).contiguous()
    generator = torch.Generator().manual_seed(0)
    views = [
        Augmentation("alternating").apply(images, torch.arange(200), seed=0, epoch=epoch, generator=generator)
        for epoch in (1, 2, 3)
    ]
    assert torch.equal(views[0], views[1].flip(-1))
    assert torch.equal(views[0], views[2])


def test_shifts_move_by_every_amount_up_to_the_limit_and_fill_with_background() -> None:
    images = torch.zeros(2000, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 14, 14] = 255
    out = augmented(Augmentation(shift=2), images)
    places = out[:, 0].flatten(1).argmax(1)
    moves = {(int(p) // 28 - 14, int(p) % 28 - 14) for p in places}
    assert moves == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    assert out.dtype == torch.uint8
    assert (out.flatten(1).sum(1) == 255).all()


def augmented(augmentation: Augmentation, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return augmentation.apply(images, torch.arange(len(images)), seed=0, epoch=1, generator=generator)


def erased(share: float, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return which pixels (B, 28, 28) were erased; as good as all, for noise may leave a value as it is."""
    return (augmented(Augmentation(erase=share), images, seed) != images).squeeze(1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_erasing_meets_its_share_and_its_areas(share: float) -> None:
    changed = erased(share, torch.zeros(4000, 1, 28, 28, dtype=torch.uint8))
    hit = changed.flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    shapes = []
    for places in changed[hit]:
        rows, columns = places.any(1).nonzero(), places.any(0).nonzero()
        tall, wide = (int(side.max() - side.min()) + 1 for side in (rows, columns))
        assert places.sum() >= 0.75 * tall * wide, "what was erased is a rectangle"
        shapes.append((tall, wide))
    areas = np.array([tall * wide / 784 for tall, wide in shapes])
    assert 0.015 < areas.min() < 0.04, "rounded to whole pixels"
    assert 0.36 < areas.max() < 0.42
    # Ratios go as far as the paper's, but for rounding, and tall is as likely as wide.
    ratios = np.log([tall / wide for tall, wide in shapes])
    assert 1.1 < abs(ratios).max() < math.log(1 / 0.3) + 0.6
    assert abs(ratios.mean()) < 5 * ratios.std() / math.sqrt(len(ratios))


def test_erasing_reaches_every_pixel_and_fills_it_with_all_values() -> None:
    images = torch.zeros(3000, 1, 28, 28, dtype=torch.uint8)
    out = augmented(Augmentation(erase=0.9), images)
    assert (out != 0).any(0).all()
    counts = torch.bincount(out.flatten().long(), minlength=256)[1:].float()
    assert counts.min() > 0.9 * counts.mean()
    assert counts.max() < 1.1 * counts.mean()


def test_erasing_keeps_what_lies_around_and_depends_on_the_generator_alone() -> None:
    images = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    before = images.clone()
    # Where a black image or a white one changes, something was erased: noise leaves no value of both as it is.
    places = erased(0.9, torch.zeros_like(images)) | erased(0.9, torch.full_like(images, 255))
    changed = erased(0.9, images)
    assert torch.equal(images, before), "the shard stays as it is"
    assert not (changed & ~places).any()
    assert (changed & places).sum() > 0.97 * places.sum()
    assert torch.equal(changed, erased(0.9, images))
    assert not torch.equal(changed, erased(0.9, images, seed=1))


def test_a_batch_is_erased_last_and_its_labels_stay(rows: Batch) -> None:
    """The first batch is flipped and shifted alike with and without."""
    plain, erasing = (batches_of(rows, flip="random", shift=2, erase=share) for share in (0.0, 0.5))
    assert all(torch.equal(one[1], other[1]) for one, other in zip(plain, erasing, strict=True))
    changed = (plain[0][0] != erasing[0][0]).flatten(1).float().mean(1)
    assert 4 <= (changed > 0).sum() <= 16
    assert changed.max() <= 0.42
    assert same(erasing, batches_of(rows, flip="random", shift=2, erase=0.5))
    assert not same(erasing, batches_of(rows, flip="random", shift=2, erase=0.5, rank=1))


def test_without_erasing_nothing_more_is_drawn() -> None:
    """So runs from before there was erasing repeat to the bit: a coin per row, then two moves."""
    generator, reference = (torch.Generator().manual_seed(3) for _ in range(2))
    images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
    Augmentation("random", 2).apply(images, torch.arange(20), seed=0, epoch=1, generator=generator)
    torch.rand(20, generator=reference)
    torch.randint(0, 5, (2, 20, 1), generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_streams_differ_in_every_part_of_the_key() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0)]
    assert len({stream_seed(*key) for key in keys[:5]}) == 5
    assert stream_seed(3, 1, 4) == stream_seed(3, 1, 4)


# --- schedule -----------------------------------------------------------------------------------------------------


def test_one_cycle_is_that_of_torch() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=100, pct_start=0.2)
    for step in range(100):
        ours = learning_rate("one-cycle", 1.0, 0.2, step, 100)
        assert ours == pytest.approx(reference.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        if step < 99:
            reference.step()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.04),  # peak / 25
        (19, 1.0),  # the peak, at the end of the warm-up
        (99, 4e-6),  # peak / 25 / 10,000
    ],
)
def test_one_cycle_landmarks(step: int, expected: float) -> None:
    assert learning_rate("one-cycle", 1.0, 0.2, step, 100) == pytest.approx(expected)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_one_cycle_of_very_few_steps_stays_within_bounds(total: int) -> None:
    for warmup in (0.0, 0.2, 0.9):
        values = [learning_rate("one-cycle", 1.0, warmup, step, total) for step in range(total)]
        assert all(0 < value <= 1 for value in values), (total, warmup, values)


def test_a_constant_schedule_is_constant() -> None:
    assert {learning_rate("constant", 0.5, 0.2, step, 10) for step in range(10)} == {0.5}


# --- optimizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("decades", [0, 3, 6])
def test_orthogonalising_by_gram_matrices_equals_the_plain_iteration(decades: int) -> None:
    """Also for matrices whose singular values span `decades` powers of ten."""
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(64, 288, generator=generator), full_matrices=False)
    matrix = u * torch.logspace(0, -decades, 64) @ v
    a, b, c = NEWTON_SCHULZ
    plain = matrix.double() / matrix.norm()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = plain @ plain.T
        plain = a * plain + (b * gram + c * gram @ gram) @ plain
    assert (orthogonalised(matrix).double() - plain).abs().max() < 1e-3


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 24 * 24, 10))


def test_muon_is_adamw_outside_the_convolutions() -> None:
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    nets = {}
    for name in ("muon", "adamw"):
        nets[name] = conv_net()
        optimizer = build_optimizer(TrainConfig(optimizer=name, lr=1e-3), nets[name])
        F.cross_entropy(nets[name](x), torch.arange(5)).backward()
        optimizer.step()
    for key in ("0.weight", "0.bias", "1.bias", "3.weight", "3.bias"):
        assert torch.equal(nets["muon"].state_dict()[key], nets["adamw"].state_dict()[key]), key
    assert not torch.equal(nets["muon"].state_dict()["1.weight"], nets["adamw"].state_dict()["1.weight"])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_the_factors_of_learned_padding_move_and_do_not_decay(name: str) -> None:
    """The weights of the same layers do: they go towards 0 where no gradient pulls."""
    net = nn.Sequential(LearnedConv2d(1, 4, 6), LearnedConv2d(4, 8, 6))
    optimizer = build_optimizer(TrainConfig(optimizer=name, lr=0.01, weight_decay=0.5), net)
    counted = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in counted}) == len(counted) == len(list(net.parameters()))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer.step()
    assert all(torch.equal(layer.border, torch.ones(2)) for layer in net)
    assert all(net.state_dict()[key].abs().sum() < before[key].abs().sum() for key in ("0.weight", "1.weight"))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((layer.border < 1).all() for layer in net)
    assert all(group["peak_lr"] == 0.01 for group in optimizer.param_groups)


def test_muon_steps_have_the_size_that_the_ratio_promises() -> None:
    weight = nn.Parameter(torch.zeros(64, 32, 3, 3))
    optimizer = Muon([{"params": [weight], "muon": True}], lr=1.5e-3, weight_decay=0.0)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach().reshape(64, -1))
    assert 0.6 * 0.02 < values.min() <= values.max() < 1.3 * 0.02


def test_optimizer_state_survives_a_round_trip() -> None:
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    one, two = conv_net(), conv_net()
    first, second = (build_optimizer(TrainConfig(optimizer="muon"), net) for net in (one, two))

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(5)).backward()
        optimizer.step()

    step(one, first)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(one, first)
    step(two, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_precision_is_resolved_from_the_hardware_or_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loop.AUTO_PRECISION, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert loop.resolve_precision("auto", CPU) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert loop.resolve_precision("auto", CPU) == "fp32"
    assert loop.resolve_precision("bf16", CPU) == "bf16"
    monkeypatch.setenv(loop.AUTO_PRECISION, "bf16")
    assert loop.resolve_precision("auto", CPU) == "bf16"
    assert loop.resolve_precision("fp32", CPU) == "fp32"
    monkeypatch.setenv(loop.AUTO_PRECISION, "fp32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert loop.resolve_precision("auto", CPU) == "fp32"
    monkeypatch.setenv(loop.AUTO_PRECISION, "fp16")
    with pytest.raises(UserError, match="FASHION_AUTO_PRECISION=fp16 must be fp32 or bf16, or not be set"):
        loop.resolve_precision("auto", CPU)


def test_muon_moves_blocks_of_filters_each_by_itself() -> None:
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(2 * BLOCK_ROWS, 4, 3, 3))
    halves = [torch.nn.Parameter(part.clone()) for part in whole.detach().split(BLOCK_ROWS)]
    gradient = torch.randn_like(whole)
    for weights, gradients in (([whole], [gradient]), (halves, gradient.split(BLOCK_ROWS))):
        for weight, grad in zip(weights, gradients, strict=True):
            weight.grad = grad.clone()
        Muon([{"params": weights, "muon": True}], lr=1.5e-3, weight_decay=0.0).step()
    assert torch.equal(whole, torch.cat(halves))
