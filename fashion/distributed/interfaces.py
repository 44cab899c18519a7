"""Which network interface workers reach each other on: the one that carries their node's address in Ray.

Left to itself, gloo takes the address that the host's own name resolves to. Debian, and containers likewise, resolve it
to 127.0.1.1 or 127.0.0.1: workers on several hosts then tell each other to connect to themselves.
"""

import os
from dataclasses import dataclass
from typing import Any

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class NetworkConfig(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """Ray Train's process group, on the interfaces of the nodes' addresses."""

    @property
    def backend_cls(self) -> type["NetworkBackend"]:
        return NetworkBackend


class NetworkBackend(_TorchBackend):  # type: ignore[misc]
    """Has every worker choose its interface before the process group is made."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Name the node's interface to gloo and NCCL, unless the user has named one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without "=" it is the start of a name: eth1 is eth10


def interface_of(address: str) -> str | None:
    """Return the interface that carries `address`; None if none does, as behind a translation of addresses."""
    import psutil  # comes with Ray, found once Ray is imported

    for name, carried in psutil.net_if_addrs().items():
        # The kernel appends the interface to a link-local address of IPv6.
        if address in {entry.address.partition("%")[0] for entry in carried}:
            return str(name)
    return None
