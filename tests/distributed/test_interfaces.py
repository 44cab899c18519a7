"""The interface of the node's own address, named to gloo and NCCL unless the user has named one."""

import os
import socket

import pytest

pytestmark = pytest.mark.ray


@pytest.fixture
def unnamed(monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> None:
    """A process on a cluster of loopback in which nobody has named an interface."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)


def test_an_interface_is_found_by_its_address(unnamed: None) -> None:
    from fashion.distributed.trainers import interface_of

    loopback = interface_of("127.0.0.1")
    assert loopback in {name for _, name in socket.if_nameindex()}
    assert interface_of("::1") in (loopback, None)
    assert interface_of("203.0.113.7") is None, "an address that is kept for examples"


def test_what_the_user_named_stays(unnamed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fashion.distributed import trainers as network

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    monkeypatch.setattr(network, "interface_of", lambda address: "eth1")
    network.choose_interface()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("mine", "=eth1")


def test_an_address_on_no_interface_names_none(unnamed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fashion.distributed import trainers as network

    monkeypatch.setattr(network, "interface_of", lambda address: None)
    network.choose_interface()
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & set(os.environ)
