"""A reference program: plain DDP as users write it, under `torchrun`, with torchvision's dataset and a `DataLoader`.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m fashion.bench.reference_ddp --storage DIR

Rank 0 reads requests from its standard input; see `fashion.bench.reference_process`.
"""

import argparse
import itertools
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fashion.bench import reference_process
from fashion.config import NUM_CLASSES
from fashion.data import loading
from fashion.data.manifest import load_manifest
from fashion.data.rows import Split
from fashion.model.network import NUM_PARAMETERS, count_parameters
from fashion.storage import open_storage
from fashion.training.batches import Batch
from fashion.training.loop import autocast


def network() -> nn.Sequential:
    """Return the published network in torch's own layers, for (B, 1, 28, 28) float images, without dropout."""
    widths = {"first": (1, 32, 32, 64), "second": (64, 128, 128, 256)}
    layers: list[nn.Module] = []
    for block in widths.values():
        for before, after in itertools.pairwise(block):
            layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    linear = [nn.Linear(256 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, NUM_CLASSES)]
    model = nn.Sequential(*layers, nn.Flatten(), *linear)
    assert count_parameters(model) == NUM_PARAMETERS["vgg"], count_parameters(model)
    return model


def torchvision_dataset(split: Split, mean: float, std: float) -> Dataset[tuple[Tensor, int]]:
    """Return torchvision's `FashionMNIST` over `split`, the rows that the job trains on.

    Its own `__getitem__` makes a PIL image of each row and transforms it. Only the loading of the arrays is replaced,
    because the original reads the official files from a folder of its own.
    """
    from torchvision import transforms
    from torchvision.datasets import FashionMNIST, VisionDataset

    class StoredFashionMNIST(FashionMNIST):  # type: ignore[misc]  # torchvision has no types
        def __init__(self) -> None:
            normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize((mean,), (std,))])
            VisionDataset.__init__(self, root=".", transform=normalise)
            self.data = torch.tensor(split.images)
            self.targets = torch.tensor(split.labels)

    dataset: Dataset[tuple[Tensor, int]] = StoredFashionMNIST()
    return dataset


def endless(dataset: Dataset[tuple[Tensor, int]], batch_size: int) -> Iterator[Batch]:
    """Yield this rank's batches for ever. The loader starts no processes, because training uses all cores."""
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(dataset, shuffle=True)
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def requests_on_all_ranks() -> Iterator[int]:
    """Yield, on every rank, the requests that rank 0 reads."""
    received = reference_process.requests() if dist.get_rank() == 0 else iter(())
    while True:
        steps = [next(received, 0)]
        dist.broadcast_object_list(steps)
        if not steps[0]:
            return
        yield steps[0]


def main() -> None:
    """Train the requested number of steps, and respond with the images/s of all ranks; repeat for each request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--batch-size", type=int, default=128, help="rows a step, of all workers")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tuned", action="store_true", help="channels-last weights and images, fused optimizer")
    flags = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    layout = torch.channels_last if flags.tuned else torch.contiguous_format
    model = DistributedDataParallel(network().to(device, memory_format=layout))  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=flags.tuned)
    storage = open_storage(flags.storage)
    manifest = load_manifest(storage)
    rows = loading.load_split(storage, manifest, "train")
    dataset = torchvision_dataset(rows, manifest.pixel_mean, manifest.pixel_std)
    batches = endless(dataset, flags.batch_size // dist.get_world_size())
    for steps in requests_on_all_ranks():
        dist.barrier()
        started = time.perf_counter()
        for _ in range(steps):
            images, labels = next(batches)
            images, labels = images.to(device, memory_format=layout), labels.to(device)
            with autocast(flags.precision, device):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        dist.barrier()
        if dist.get_rank() == 0:
            reference_process.respond(steps * flags.batch_size / (time.perf_counter() - started))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
