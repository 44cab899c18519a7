"""The network interface through which workers exchange gradients: the one with their node's address in Ray.

By default gloo uses the address that the host's own name resolves to. Debian and many containers resolve it to
127.0.1.1 or 127.0.0.1; workers on several hosts would then tell each other to connect to themselves.
"""

import os
from dataclasses import dataclass
from typing import Any

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class NetworkConfig(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """Ray Train's `TorchConfig`, with `NetworkBackend` to set up the process group."""

    @property
    def backend_cls(self) -> type["NetworkBackend"]:
        return NetworkBackend


class NetworkBackend(_TorchBackend):  # type: ignore[misc]
    """Makes every worker choose its interface before the process group is created."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Set the node's interface for gloo and NCCL in the environment, unless the user has set one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # Without "=" NCCL takes the name as a prefix: eth1 would match eth10.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def interface_of(address: str) -> str | None:
    """Return the interface that has `address`, or None if none has it, as behind network address translation."""
    import psutil  # part of Ray, which makes it importable when Ray is imported

    for name, entries in psutil.net_if_addrs().items():
        # The kernel appends the interface's name to a link-local IPv6 address.
        if address in {entry.address.partition("%")[0] for entry in entries}:
            return str(name)
    return None
