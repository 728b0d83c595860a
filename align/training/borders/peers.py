"""The processes of a run end together: where one dies, the others say which and why, and end too.

A collective cannot tell a dead process from a slow one: the first may tokenise for hours while the others wait for it.
So every process holds a connection to the first. Nothing is sent on it while all is well. A process that dies has its
connection closed by its system. Where a host or the network is gone, the system's own probes (TCP keepalive) fail
after SILENCE seconds. Both need nothing from a living process: a long step is never taken for a death.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from os import _exit  # by name: around a user's own code, os._exit is another
from typing import Any, NamedTuple

from torch.distributed import DistError, TCPStore

from align.recipe.errors import UserError, printable

JOINING = 300.0  # seconds within which all processes of a run have to be there
SILENCE = 30  # seconds without an answer from a host before it counts as lost
GRACE = 2.0  # seconds in which a process may end by itself, with a reason of its own
EXIT = 120.0  # seconds after which a process that has told its fault is ended, whatever it still waits for
RERUN = "this run ends here; start it again on every host to go on from the last checkpoint"
KEEPALIVE = {"TCP_KEEPIDLE": SILENCE // 3, "TCP_KEEPINTVL": SILENCE // 6, "TCP_KEEPCNT": 4}
LOST = "does not answer any more: its host is down, or the network to it"
DIED = "has ended without a word: it was killed, or its memory ran out (its host's system log says more)"


class Name(NamedTuple):
    """A process of a run."""

    rank: int
    local: int  # its number on its host
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.rank} (host {self.host}, pid {self.pid})"


class Peers:
    """The other processes of this run, watched from a thread. Of one process alone, every method does nothing."""

    def __init__(self) -> None:
        self.rank, local, self.world = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        self.own = Name(self.rank, local, socket.gethostname(), os.getpid())
        self.names = {self.rank: self.own}
        self._lines: dict[int, socket.socket] = {}  # rank -> the connection to it; the first process has all
        self._over = threading.Event()  # this process ends by itself
        self._lock = threading.Lock()

    # -- from the main thread ----------------------------------------------------------------------------------

    def join(self) -> None:
        """Find the others, through the address that the launcher gave, and watch them from now on.

        Raises UserError where they are not all there within JOINING seconds.
        """
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if self.world < 2 or not address or not port or "RANK" not in os.environ:
            return  # alone, or started by another launcher (MPI), which ends them together itself
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own store is there already
        key = f"align/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            self._store = TCPStore(  # kept: the process group finds the first one's server by its port
                address, int(port), None, self.rank == 0 and not agents, timedelta(seconds=JOINING),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
            if self.rank == 0:
                self._gather(address, key)
            else:
                self._meet(address, json.loads(self._store.get(key)))
        except UserError:
            raise
        except (DistError, OSError, ValueError) as error:
            raise UserError(
                f"process {self.rank} of {self.world} does not find process 0 at {address}:{port} within {JOINING:.0f} "
                f"seconds ({str(error).splitlines()[0][:200]}); start the run on every host, with the same address"
            ) from None
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def leave(self) -> None:
        """This process ends as it should; nobody has to end for it."""
        self._over.set()
        self._tell({"kind": "left"})

    def fault(self, reason: str, status: int) -> None:
        """This process ends because of `reason`; the others are told, and end with this status."""
        if self._over.is_set() or not self._lines:
            return
        self._over.set()
        self._tell({"kind": "ended", "rank": self.rank, "reason": f"has ended: {reason}", "status": status})
        later = threading.Timer(EXIT, _exit, [status])  # a process group may wait for ever for the others
        later.daemon = True
        later.start()

    def explain(self, error: Exception) -> None:
        """After a failed collective: wait until it is known who is gone, which ends this process; else return."""
        if self._lines and (isinstance(error, DistError) or "by peer" in str(error) or "gloo" in str(error).lower()):
            time.sleep(SILENCE + 5 * GRACE)

    def elsewhere(self) -> bool:
        """Whether this process speaks for a host on which the first process is not."""
        return self.own.local == 0 and self.names.get(0, self.own).host != self.own.host

    # -- how they meet -----------------------------------------------------------------------------------------

    def _gather(self, address: str, key: str) -> None:
        token, family = secrets.token_hex(16), socket.getaddrinfo(address, 0)[0][0]
        try:
            server = socket.create_server((address, 0), family=family, backlog=self.world)
        except OSError:  # the others see this host under an address that it does not have itself
            server = socket.create_server(("", 0), family=family, backlog=self.world)
        with server:
            self._store.set(key, json.dumps({"port": server.getsockname()[1], "token": token}))
            deadline = time.monotonic() + JOINING
            while missing := set(range(self.world)) - set(self.names):
                try:
                    server.settimeout(max(deadline - time.monotonic(), 0.01))
                    line, _ = server.accept()
                except TimeoutError:
                    numbers = ", ".join(map(str, sorted(missing)))
                    raise UserError(
                        f"of {self.world} processes, {numbers} did not come within {JOINING:.0f} seconds; look at what "
                        "they say, and start the run on every host again"
                    ) from None
                with suppress(OSError, ValueError, KeyError, TypeError):
                    hello = json.loads(_read_line(line))
                    if secrets.compare_digest(hello["token"], token):
                        name = Name(*hello["name"])
                        self.names[name.rank], self._lines[name.rank] = name, _kept_alive(line)
                        continue
                line.close()  # who else may connect to a port
        self._tell({"kind": "met", "names": list(self.names.values())})

    def _meet(self, address: str, found: dict[str, Any]) -> None:
        line = _kept_alive(socket.create_connection((address, found["port"]), JOINING))
        line.sendall(_packed({"token": found["token"], "name": self.own}))
        met = json.loads(_read_line(line, JOINING))
        self.names |= {name[0]: Name(*name) for name in met["names"]}
        self._lines[0] = line

    # -- the thread --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Until one is lost, or all have left. Only the first process hears of all; the others hear it from there."""
        heard = dict.fromkeys(self._lines, b"")
        with selectors.DefaultSelector() as ready:
            for rank, line in self._lines.items():
                ready.register(line, selectors.EVENT_READ, rank)
            while heard:
                for key, _ in ready.select():
                    rank = key.data
                    try:
                        data = key.fileobj.recv(4096)
                        lost = None if data else DIED
                    except OSError as error:
                        lost = DIED if error.errno == errno.ECONNRESET else LOST
                    if lost:
                        self._end({"rank": rank, "reason": lost, "status": 2})
                        return
                    *lines, heard[rank] = (heard[rank] + data).split(b"\n")
                    for message in map(json.loads, lines):
                        if message["kind"] == "ended":
                            self._end(message)
                            return
                        ready.unregister(key.fileobj)  # it has left
                        del heard[rank]

    def _end(self, verdict: dict[str, Any]) -> None:
        """End this process, from the first one's thread all others; what it does itself within GRACE goes before."""
        if self.rank == 0:
            self._tell({"kind": "ended", **verdict})
        if self._over.wait(GRACE):
            return
        name, reason = self.names[verdict["rank"]], verdict["reason"]
        if self.own.local == (name.host == self.own.host and name.local == 0):  # one speaks on each host
            with suppress(OSError, ValueError):
                print(printable(f"{name} {reason}; {RERUN}"), file=sys.stderr, flush=True)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        _exit(verdict["status"])

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            for line in self._lines.values():
                with suppress(OSError):
                    line.sendall(_packed(message))


def _packed(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_line(line: socket.socket, seconds: float = 10.0) -> bytes:
    """One line of at most 1 MB, byte by byte, for what follows is the thread's."""
    line.settimeout(seconds)
    found = bytearray()
    while not found.endswith(b"\n"):
        byte = line.recv(1)
        if not byte or len(found) > 1 << 20:
            raise OSError("the connection ended")
        found += byte
    line.settimeout(None)
    return bytes(found)


def _kept_alive(line: socket.socket) -> socket.socket:
    """With the system's probes on, as far as it has them; without them, a cut is seen when something is sent."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = KEEPALIVE | {"TCP_KEEPALIVE": SILENCE // 3, "TCP_USER_TIMEOUT": SILENCE * 1000}  # the first is macOS's
    for name, value in settings.items():
        if hasattr(socket, name):
            with suppress(OSError):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line
