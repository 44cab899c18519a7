"""Several hosts on one machine: each has processes, a network address, a name and shared memory of its own.

A host is a set of the kernel's namespaces (PID, network, mount, UTS, IPC) around one process, its `init`. Its eth0
leads to a switch, which is a namespace as well: the machine's own interfaces, routes and processes are left as they
are, and `ray stop`, which kills whatever looks like Ray, sees the host's processes alone. To end `init` is to cut the
power: the kernel kills the rest, and the namespaces go with the last process. All ends with the process that made it.

The file system is shared, as an NFS mount would be, apart from /etc/hosts, which gives the host's name a loopback
address as Debian does, the home folder, /run and /dev/shm.
"""

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from conftest import RAY_SETTINGS, ROOT

from fashion.cluster.connection import TOO_SLOW
from fashion.config import RAY_ENVIRONMENT

TOOLS = ("ip", "nsenter", "unshare", "setpriv", "mount")
PORT = 6379
DASHBOARD = "http://127.0.0.1:8265"
STORE_BYTES = 200_000_000
START_TIMEOUT_S = 600.0
# A host out of reach is found out in half a minute; one that is merely busy must not be taken for dead.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
INIT = """
set -e
hostname {name}
ip link set lo up
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/passwd /etc/passwd
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
echo ready
while sleep 3600; do :; done
"""


@functools.cache
def why_not() -> str:
    """Return why there can be no hosts here; an empty string if they can be."""
    if sys.platform != "linux":
        return "hosts are namespaces of Linux"
    if os.geteuid() != 0:
        return "hosts need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"hosts need {', '.join(missing)} (packages iproute2, util-linux)"
    command = ["unshare", *UNSHARED, "ip", "link", "add", "probe", "type", "bridge"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"the kernel refuses namespaces: {done.stderr.strip()}" if done.returncode else ""


UNSHARED = ("--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child")


@dataclass
class Host:
    """One host: `number` gives its name and its address."""

    number: int
    folder: Path
    init: subprocess.Popen[str] | None = None
    ray: subprocess.Popen[bytes] | None = None
    pid: int = 0
    """Of `init`, as the machine counts."""

    @property
    def name(self) -> str:
        """The host's own name, which its /etc/hosts resolves to 127.0.1.1."""
        return f"host{self.number}"

    @property
    def address(self) -> str:
        """The address that the other hosts reach it at."""
        return f"10.77.0.{self.number}"

    @property
    def home(self) -> Path:
        """Its user's home folder."""
        return self.folder / "home"

    @property
    def log(self) -> Path:
        """What `ray start` printed."""
        return self.folder / "ray.log"


@dataclass
class Hosts:
    """Hosts on one switch; see `open_hosts`."""

    folder: Path
    switch: Host
    hosts: list[Host] = field(default_factory=list)

    @property
    def head(self) -> Host:
        """The host whose Ray node is the head."""
        return self.hosts[0]

    @property
    def token(self) -> Path:
        """The file with the cluster's token."""
        return self.folder / "token"

    def environment(self, host: Host) -> dict[str, str]:
        """Return what commands run with: this Python, the cluster's address and token, nothing of the user's Ray."""
        foreign = ("RAY_", "MAKE", "MFLAGS", "FASHION_STORAGE", "SSH_")
        own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return own | RAY_ENVIRONMENT | RAY_SETTINGS | QUICK_HEALTH_CHECKS | {
            "HOME": str(host.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_ADDRESS": f"{self.head.address}:{PORT}",
            "RAY_API_SERVER_ADDRESS": DASHBOARD,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_TMPDIR": str(host.folder),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process less for each run
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(host.folder),  # a head whose power is cut leaves its own there
        }  # fmt: skip

    def enter(self, host: Host, *command: str) -> list[str]:
        """Return the command that runs `command` in `host`, in the project's folder."""
        return ["nsenter", f"--target={host.pid}", "-n", "-p", "-m", "-u", "-i", "env", "-C", str(ROOT), *command]

    def run(self, host: Host, *command: str, timeout_s: float = 1800, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a command in `host` to its end; its output as text."""
        variables = self.environment(host) | extra
        return subprocess.run(
            self.enter(host, *command), capture_output=True, text=True, env=variables, timeout=timeout_s, check=False
        )

    def popen(self, host: Host, *command: str, log: Path, **extra: str) -> subprocess.Popen[bytes]:
        """Start a command in `host`, its output in `log`."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self.enter(host, *command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment(host) | extra,
            )

    def boot(self, host: Host) -> None:
        """Make the namespaces of a host, and plug its eth0 into the switch."""
        shutil.rmtree(host.folder, ignore_errors=True)
        host.home.mkdir(parents=True)
        (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
        users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        users = [[*user[:5], str(host.home), "/bin/bash"] if user[2:3] == ["0"] else user for user in users]
        (host.folder / "passwd").write_text("".join(":".join(user) + "\n" for user in users))
        start_init(host)
        port, at = port_of(host), ("nsenter", f"--target={self.switch.pid}", "-n")
        call(*at, "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        call(*at, "ip", "link", "set", port, "master", "bridge", "up")
        inside = ("nsenter", f"--target={host.pid}", "-n", "ip")
        call(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
        call(*inside, "link", "set", "eth0", "up")
        # Ray asks the routes which address leads out; nothing answers at the other end.
        call(*inside, "route", "add", "default", "via", "10.77.0.254")

    def start(self, host: Host) -> None:
        """Start a Ray node in `host`, booted anew if it is off; `wait` says when it is there."""
        if host.init is None:
            self.boot(host)
        role = ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
        if host is not self.head:
            role = [f"--address={self.head.address}:{PORT}"]
        role.append("--include-log-monitor=false")  # nobody reads what it would pass on
        host.ray = self.popen(
            host, "ray", "start", "--block", *role, f"--node-ip-address={host.address}", "--num-cpus=1",
            f"--object-store-memory={STORE_BYTES}", f"--temp-dir={host.folder}/ray", log=host.log,
        )  # fmt: skip

    def wait(self, host: Host) -> None:
        """Wait until the Ray node of `host` is up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while "This command will now block" not in host.log.read_text():
            assert host.ray is not None and time.monotonic() < deadline, host.log.read_text()
            if host.ray.poll() is not None:
                assert TOO_SLOW in host.log.read_text(), host.log.read_text()
                self.kill(host)
                self.start(host)
            time.sleep(0.2)

    def serve_ssh(self, host: Host, key: Path) -> None:
        """Let whoever has the private `key` into `host` by SSH; login shells have the settings of `environment`."""
        for name in ("host_key", "authorized_keys"):
            (host.folder / name).unlink(missing_ok=True)
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{host.folder}/host_key")
        shutil.copy(key.with_suffix(".pub"), host.folder / "authorized_keys")
        told = RAY_SETTINGS | QUICK_HEALTH_CHECKS | {"RAY_TMPDIR": str(host.folder)}
        (host.home / ".bashrc").write_text("".join(f"export {key}={value}\n" for key, value in told.items()))
        options = {
            "ListenAddress": host.address,
            "HostKey": f"{host.folder}/host_key",
            "AuthorizedKeysFile": f"{host.folder}/authorized_keys",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "yes",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
        }
        (host.folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
        server = ["/usr/sbin/sshd", "-f", f"{host.folder}/sshd_config", "-E", f"{host.folder}/sshd.log"]
        done = self.run(host, "sh", "-c", 'mkdir -p /run/sshd && exec "$@"', "sh", *server)
        assert done.returncode == 0, done.stderr

    def cut(self, host: Host) -> None:
        """Pull the host's network cable: nobody is told, packets stay away."""
        call("nsenter", f"--target={self.switch.pid}", "-n", "ip", "link", "set", port_of(host), "down")

    def mend(self, host: Host) -> None:
        """Plug the cable in again."""
        call("nsenter", f"--target={self.switch.pid}", "-n", "ip", "link", "set", port_of(host), "up")

    def kill(self, host: Host) -> None:
        """Cut the host's power: every process of it is gone at once."""
        if host.init is not None and host is not self.switch:
            # The kernel takes a network namespace apart some time after its last process; until then a host that is
            # booted anew would find its port of the switch in use. A host that was booted half has none.
            at = ("nsenter", f"--target={self.switch.pid}", "-n")
            subprocess.run([*at, "ip", "link", "delete", port_of(host)], capture_output=True, check=False)
        if host.init is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.pid, signal.SIGKILL)
            host.init.wait()
        if host.ray is not None:
            host.ray.wait()
        host.init = host.ray = None

    def processes(self, host: Host) -> dict[int, str]:
        """Return the command lines of the host's processes, `init` and what it waits for apart."""
        if host.init is None:
            return {}
        inside, found = os.readlink(f"/proc/{host.pid}/ns/pid"), {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if os.readlink(entry / "ns" / "pid") == inside and line not in ("sleep 3600", ""):
                    found[int(entry.name)] = line
            except OSError:
                continue
        found.pop(host.pid, None)  # its power may have been cut meanwhile
        return found


def port_of(host: Host) -> str:
    """Return the name of the switch's end of the host's cable."""
    return f"port{host.number}"


def start_init(host: Host) -> None:
    """Start the process that is the host; it ends with the thread that calls this."""
    script = INIT.format(name=host.name, folder=host.folder)
    host.init = subprocess.Popen(
        ["setpriv", "--pdeathsig=KILL", "unshare", *UNSHARED, "bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # unshare complains when it is killed
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests, which then take the hosts down
    )
    assert host.init.stdout is not None
    assert host.init.stdout.readline() == "ready\n", "init did not come up"
    host.init.stdout.close()
    host.pid = int(Path(f"/proc/{host.init.pid}/task/{host.init.pid}/children").read_text())


def call(*command: str) -> None:
    """Run a short command that must not fail."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (command, done.stderr)


@contextlib.contextmanager
def open_hosts(count: int) -> Iterator[Hosts]:
    """Yield `count` hosts that are up, without Ray; nothing of them is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))  # paths of Ray's sockets must be short
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    made = Hosts(folder, Host(0, folder / "0"))
    try:
        switch = made.switch
        switch.folder.mkdir()
        (switch.folder / "hosts").touch()
        shutil.copy("/etc/passwd", switch.folder / "passwd")
        start_init(switch)
        at = ("nsenter", f"--target={switch.pid}", "-n", "ip", "link")
        call(*at, "add", "bridge", "type", "bridge")
        call(*at, "set", "bridge", "up")
        for number in range(1, count + 1):
            made.hosts.append(Host(number, folder / str(number)))
            made.boot(made.hosts[-1])
        yield made
    finally:
        for host in [*made.hosts, made.switch]:
            made.kill(host)
        shutil.rmtree(folder)


@contextlib.contextmanager
def open_cluster(count: int) -> Iterator[Hosts]:
    """Yield `count` hosts with a Ray node each, of one CPU; the first is the head."""
    with open_hosts(count) as hosts:
        hosts.start(hosts.head)
        hosts.wait(hosts.head)
        for host in hosts.hosts[1:]:
            hosts.start(host)
        for host in hosts.hosts[1:]:
            hosts.wait(host)
        yield hosts
