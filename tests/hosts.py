"""Two hosts on one machine: network namespaces with a cable between them that can be cut, each with a name."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from forks import ends_with_its_test
from world import Child

from align import sft

CABLE = "cable"  # the network device of either host


class Hosts:
    """Hosts 0 and 1, at 10.86.0.1 and 10.86.0.2."""

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names

    def ip(self, host: int, *words: str) -> None:
        ip("-n", self.names[host], *words)

    def cut(self) -> None:
        """From now on nothing arrives, and nothing says so."""
        self.ip(1, "link", "set", CABLE, "down")

    def mend(self) -> None:
        self.ip(1, "link", "set", CABLE, "up")

    def address(self, host: int) -> str:
        return f"10.86.0.{host + 1}"

    def pair(self, folder: Path, port: int, *argv: object, stage: ModuleType = sft) -> list[Child]:
        """A process of one run on each host."""
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": self.address(0), "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        ranks = [
            shared | {"RANK": str(i), "GLOO_SOCKET_IFNAME": CABLE, "NAMESPACE": name}
            for i, name in enumerate(self.names)
        ]
        return [Child(folder, *argv, stage=stage, rank=rank) for rank in ranks]

    def launch(self, host: int, command: list[str], log: Path) -> subprocess.Popen:
        """A command on a host, in a session of its own; what it says goes to `log`."""
        name = self.names[host]
        inside = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        env = os.environ | {"GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1"}
        with log.open("w") as out:
            process = subprocess.Popen([*inside, *command], stdout=out, stderr=out, env=env, start_new_session=True)
        ends_with_its_test(process.pid)
        return process


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Raises OSError or CalledProcessError where this machine lets nobody make namespaces."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        raise OSError("there is no iproute2 and util-linux")
    hosts = Hosts((f"align{os.getpid()}a", f"align{os.getpid()}b"))
    known = [f"{hosts.address(i)} {name}\n::ffff:{hosts.address(i)} {name}\n" for i, name in enumerate(hosts.names)]
    try:
        for name in hosts.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            etc = Path("/etc/netns", name)  # what `ip netns exec` puts in the place of files in /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(known))
            (etc / "resolv.conf").write_text("")
        ends = ["netns", hosts.names[0], "type", "veth", "peer", "name", CABLE, "netns", hosts.names[1]]
        ip("link", "add", CABLE, *ends)
        for host in range(2):
            hosts.ip(host, "addr", "add", f"{hosts.address(host)}/24", "dev", CABLE)
            hosts.ip(host, "link", "set", CABLE, "up")
        yield hosts
    finally:
        for name in hosts.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)
