"""The files for clusters: versions are those of the lock file, Ray takes them, `ray up` brings a cluster up."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
import yaml
from conftest import ROOT, wait_for
from hosts import Hosts

from fashion import cli, config
from fashion.reports import runs
from fashion.storage import Storage
from jobs import train

LAUNCHER, KUBERAY = ROOT / "cluster.yaml", ROOT / "jobs" / "rayjob.yaml"
# What in the launcher's file belongs to AWS; the rest stands in the tests as it stands there.
OF_AWS = ("available_node_types", "head_node_type", "head_setup_commands", "max_workers")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def locked() -> dict[str, str]:
    """Return the version of each package in the lock file."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    return {package["name"]: package["version"] for package in packages}


def unexplained(path: Path, keys: Iterable[str], indent: str = "") -> list[str]:
    """Return those of `keys`, indented by `indent` in the file, that have no comment above them."""
    lines = path.read_text().splitlines()
    above = {key: lines[[line.startswith(f"{indent}{key}:") for line in lines].index(True) - 1] for key in keys}
    return [key for key, line in above.items() if not line.lstrip().startswith("#")]


# --- as text ------------------------------------------------------------------------------------------------------


def test_versions_are_those_of_the_lock_file() -> None:
    versions = locked()
    [check] = [command for command in load(LAUNCHER)["setup_commands"] if "assert" in command]
    assert dict(re.findall(r"'(\w+)': '([\d.]+)'", check)) == {
        name: versions[name] for name in ("ray", "torch", "pyarrow")
    }
    kuberay = KUBERAY.read_text()
    assert load(KUBERAY)["spec"]["rayClusterSpec"]["rayVersion"] == versions["ray"]
    assert set(re.findall(r"fashion:ray-([\d.]+)-torch-([\d.]+)", kuberay)) == {(versions["ray"], versions["torch"])}
    assert re.findall(r"rayproject/ray:([\d.]+)-py", kuberay) == [versions["ray"]]
    [uv] = re.findall(r"UV_VERSION := (\S+)", (ROOT / "Makefile").read_text())
    assert re.findall(r"/uv/([\d.]+)/", LAUNCHER.read_text()) == re.findall(r"uv==([\d.]+)", kuberay) == [uv]


def test_no_file_holds_a_secret() -> None:
    for path in (LAUNCHER, KUBERAY):
        assert not re.search(r"[0-9a-fA-F]{32}|AKIA|BEGIN|password", path.read_text()), path


def test_every_key_of_the_launcher_is_explained() -> None:
    left = unexplained(LAUNCHER, load(LAUNCHER))
    assert left == ["worker_start_ray_commands"], "it is explained with that of the head"


def test_the_head_trains_nothing_and_its_dashboard_is_private() -> None:
    launcher = load(LAUNCHER)
    head = launcher["available_node_types"][launcher["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    [start] = [command for command in launcher["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0" in start and "--dashboard-host=127.0.0.1" in start
    [workers] = [kind for name, kind in launcher["available_node_types"].items() if name != launcher["head_node_type"]]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 == workers["min_workers"] < workers["max_workers"] <= launcher["max_workers"]
    [environment] = [command for command in launcher["setup_commands"] if "printf" in command]
    for name, value in config.RAY_ENVIRONMENT.items():
        assert f"{name}={value}" in environment
        assert {"name": name, "value": value} in kuberay_containers()[0]["env"]


# --- KubeRay ------------------------------------------------------------------------------------------------------


def kuberay_containers() -> list[Any]:
    """Return the container of the head and that of the workers."""
    cluster = load(KUBERAY)["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_a_rayjob_is_tried_again_ends_and_leaves_nothing() -> None:
    job = load(KUBERAY)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["backoffLimit"] > 0 and spec["submitterConfig"]["backoffLimit"] > 0
    assert 0 < spec["ttlSecondsAfterFinished"] < spec["activeDeadlineSeconds"]
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for container in kuberay_containers():
        [mount] = container["volumeMounts"]
        assert {"name": "FASHION_STORAGE", "value": mount["mountPath"]} in container["env"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [volume] = group["template"]["spec"]["volumes"]
        assert "persistentVolumeClaim" in volume, "the storage goes with the cluster"
    assert unexplained(KUBERAY, spec, "  ") == ["rayClusterSpec"], "it is explained line by line"


def test_a_rayjob_started_again_resumes_its_run() -> None:
    python, module, job, *words = load(KUBERAY)["spec"]["entrypoint"].split()
    assert (python, module, job) == ("python", "-m", "jobs.train")
    assert {"--start-or-resume", "--run-id"} <= set(words)
    flags = cli.parse(train.Flags, words, prog=train.PROG, description="", default=train.Flags())
    flags.scale.check_batch(flags.train.global_batch_size)
    workers = load(KUBERAY)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert load(KUBERAY)["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"], "no worker is up before the job asks"
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, max(flags.scale.worker_range))


# --- the launcher -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_takes_the_launchers_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    launcher = load(LAUNCHER)
    prepared = prepare_config(launcher)
    validate_config(prepared)
    for key, value in launcher.items():
        if not key.endswith("setup_commands") and key != "available_node_types":
            assert prepared[key] == value, key
    for name, kind in launcher["available_node_types"].items():
        assert prepared["available_node_types"][name] == {"min_workers": 0, "max_workers": 0} | kind
    for kind in ("head", "worker"):
        assert prepared[f"{kind}_setup_commands"][: len(launcher["setup_commands"])] == launcher["setup_commands"]
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepared | {"idle_minutes": 1})


def why_no_ssh() -> str:
    """Return why there is no SSH between hosts here; an empty string if there is."""
    missing = [tool for tool in ("/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync") if shutil.which(tool) is None]
    return hosts.why_not() or (f"needs {', '.join(missing)}" if missing else "")


def launcher_for(machines: Hosts, key: Path, storage: Storage) -> dict[str, Any]:
    """Return the launcher's file for the test's hosts: all that does not belong to AWS stands as it is."""
    _, head, worker = machines.hosts
    own = {name: value for name, value in load(LAUNCHER).items() if name not in OF_AWS}
    kept = [command for command in own["setup_commands"] if "/bin/uv" not in command]  # nothing is downloaded here
    assert len(kept) == len(own["setup_commands"]) - 2
    return own | {
        "cluster_name": machines.folder.name,
        "provider": {"type": "local", "head_ip": head.address, "worker_ips": [worker.address]},
        "auth": {"ssh_user": "root", "ssh_private_key": str(key)},
        "setup_commands": [re.sub(r"s3://\S+", storage.uri, command) for command in kept],
    }


@pytest.fixture
def machines() -> Iterator[Hosts]:
    """Three hosts without Ray: whoever launches, the head to be, and a worker to be."""
    before = launchers_files()
    with hosts.open_hosts(3) as made:
        yield made
    for path in launchers_files() - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def launchers_files() -> set[Path]:
    """Return what Ray's launcher leaves in /tmp: sockets of shared SSH connections, configurations that it keeps."""
    return {path for pattern in ("ray_ssh_*/*", "ray-config-*") for path in Path("/tmp").glob(pattern)}


@pytest.mark.hosts
@pytest.mark.skipif(bool(why_no_ssh()), reason=why_no_ssh() or "ssh")
def test_ray_up_exec_and_down(machines: Hosts, tiny_storage: Storage, tmp_path: Path) -> None:
    launch, head, worker = machines.hosts
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (launch.home / ".ray").mkdir()
    shutil.copy(machines.token, launch.home / ".ray" / "auth_token")
    for host in (head, worker):
        machines.serve_ssh(host, key)
        (host.home / "fashion").mkdir()
        (host.home / "fashion" / ".venv").symlink_to(sys.prefix)  # in place of what `uv sync` would make
    server = set(machines.processes(head))
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(launcher_for(machines, key, tiny_storage)))

    # The newer autoscaler, Ray 2.60's default, finds no head among the nodes of provider `local`, and starts no worker.
    variables = {"RAY_AUTH_TOKEN_PATH": "", "RAY_ADDRESS": "", "RAY_UP_enable_autoscaler_v2": "0"}

    def ray(*command: str) -> subprocess.CompletedProcess[str]:
        return machines.run(launch, "ray", *command, **variables)

    up = ray("up", "-y", "--no-config-cache", str(file))
    assert up.returncode == 0, up.stdout + up.stderr
    for host in (head, worker):
        wait_for(lambda host=host: any("raylet" in line for line in machines.processes(host).values()), "raylet")
        token = host.home / ".ray" / "auth_token"
        assert (token.read_text(), token.stat().st_mode & 0o777) == (machines.token.read_text(), 0o600)
    status = {"RAY_ADDRESS": f"{head.address}:6379"}
    wait_for(lambda: " CPU" in machines.run(head, "ray", "status", **status).stdout, "node with a CPU")
    flags = "--run-id launched --source auto --preset smoke --precision fp32 --max-train-rows 256 --epochs 1"
    job = f"python -m jobs.train {flags} --num-workers 1"
    submit = f"ray job submit --address http://127.0.0.1:8265 --working-dir . -- {job}"
    done = ray("exec", "--no-config-cache", str(file), f"cd {ROOT} && {submit}")
    assert done.returncode == 0, done.stdout + done.stderr
    row = runs.load_run(tiny_storage, "launched")
    assert (row["status"], row["test_rows"]) == ("completed", 200)
    refused = machines.run(head, "ray", "status", RAY_AUTH_TOKEN="0" * 64, RAY_ADDRESS=f"{head.address}:6379")
    assert refused.returncode != 0, "whoever has no token is let in"
    elsewhere = machines.run(launch, "bash", "-c", f"exec 3<>/dev/tcp/{head.address}/8265")
    assert "refused" in elsewhere.stderr, "the dashboard is there for the whole network"
    down = ray("down", "-y", str(file))
    assert down.returncode == 0, down.stdout + down.stderr
    assert "No nodes remaining" in down.stdout + down.stderr
    wait_for(lambda: set(machines.processes(head)) <= server, "end of what ran on the head")
    # With `local` nobody ends the worker's machine. Its raylet goes once the head is gone; power ends the rest.
    wait_for(
        lambda: not any("raylet" in line.split()[0] for line in machines.processes(worker).values()), "raylet's end"
    )
