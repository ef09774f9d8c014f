"""``--engine ray``: the members of a team are actors of a Ray cluster, whatever nodes and GPUs Ray finds for them.

The command reads, renders, plans and writes where it runs, and only passes and their statistics travel. So the pool and
the scores are on one node, the student on all of them (or a hub's id), and the rows are those of a run without Ray.

Ray Data is not what distributes the passes. In its actor pools a pass whose actor was lost waits for that very actor to
be restarted, on a cluster without a spare GPU until all other passes are done, and so does every window behind it; and
a pass that ends its process is tried for ever, or ends the run. ``Team`` gives it to another actor at once, and after
three times leaves out the trajectory that does it. For pipelines of Ray Data see ``lark_fast.dropins.ray_data``.
"""

import io
import os
import pickle
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

import lark_fast
from lark_fast.errors import UserError
from lark_fast.processes import LostProcessError
from lark_fast.scoring.run import ScoreConfig, chosen_dtype
from lark_fast.scoring.team import Team
from lark_fast.scoring.team_member import Asked, Refused, serve_on, weights_of
from lark_fast.student_files import whole_path

PATIENCE_SECONDS = 60.0  # for a cluster, and for its first actor, before it is said what is waited for
REACH_SECONDS = 5.0


@contextmanager
def ray_team(config: ScoreConfig) -> Iterator[Team]:
    """The student in actors, one a GPU of the cluster or as many as asked for.

    Raises:
        UserError: no cluster answers, there is no such device in it, or no actor can load the student.
    """
    with _cluster(config.ray_address):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        devices, needs = choose_actors(nodes, config.devices, config.device)
        # What depends on this machine is settled here: an actor has another working directory, and perhaps no store.
        given = {name: getattr(config, name) for name in ("student", "after", "base")}
        paths = {name: whole_path(place) for name, place in given.items() if place is not None}
        asked = replace(config, **paths, dtype=chosen_dtype(config))
        with Team(asked, devices, Actors(needs), weights_of(config)) as team:
            yield team


def choose_actors(
    nodes: Sequence[Mapping[str, float]], devices: str | None, device: str
) -> tuple[list[str], dict[str, float]]:
    """How many actors, on what, and what each takes.

    Args:
        nodes: the resources of each node, as Ray counts them.
        devices: how many; "all" or None: one a GPU, and without GPUs one a node.
        device: "auto", "cuda" or "cpu".

    Returns:
        A device an actor, by the name that it has there, and the resources of each: a GPU, or an equal share of the
        CPUs such that all find room.

    Raises:
        UserError: there is no such device.
    """
    if devices not in (None, "all") and not (devices.isdecimal() and int(devices) > 0):
        raise UserError(f"--devices {devices}: with --engine ray a number of actors, or all")
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device {device}: which one is Ray's to say; auto, cuda or cpu with --engine ray")
    counts = {name: [int(node.get(name, 0)) for node in nodes] for name in ("GPU", "CPU")}
    name = "GPU" if device == "cuda" or (device == "auto" and any(counts["GPU"])) else "CPU"
    there = sum(counts[name])
    if devices in (None, "all"):
        number = there if name == "GPU" else sum(count > 0 for count in counts[name])
        if not number:
            raise UserError(f"--device {device}: the Ray cluster has no {name}; --devices says how many it is to get")
    else:
        number = int(devices)
    if number > there:
        _say(f"the Ray cluster has {there} {name}s for {number} actors; the others start when it has more")
    if name == "GPU":
        return ["cuda:0"] * number, {"num_gpus": 1, "num_cpus": 1}
    shares = range(max(1, *counts[name]), 1, -1)
    share = next((share for share in shares if sum(count // share for count in counts[name]) >= number), 1)
    return ["cpu"] * number, {"num_gpus": 0, "num_cpus": share}


class Ends:
    """A ``TwoWay`` between the threads of an actor."""

    def __init__(self) -> None:
        self.received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.told: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def tell(self, pickled: bytes) -> None:
        """See ``TwoWay``."""
        self.told.put(pickled)


# A thread for each method: what is sent comes in while somebody waits for what is told.
@ray.remote(concurrency_groups={"in": 1, "out": 1}, max_restarts=0, max_task_retries=0)
class _Actor:
    """A member of a team; see ``team_member``."""

    def __init__(self, version: str) -> None:
        self._ends, where = Ends(), ray.util.get_node_ip_address()
        if version != lark_fast.__version__:
            reason = f"lark-fast is {lark_fast.__version__} on {where} and {version} where the command runs"
            self._ends.tell(pickle.dumps(Refused(reason)))
            return
        threading.Thread(target=serve_on, args=(self._ends, where), daemon=True).start()

    @ray.method(concurrency_group="in")
    def send(self, pickled: bytes) -> None:
        """Send it a message."""
        self._ends.received.put(pickled)

    @ray.method(concurrency_group="out")
    def receive(self) -> bytes:
        """Wait for its next message."""
        return self._ends.told.get()


class _ActorProcess:
    """The command's side of an actor: a ``Process``."""

    def __init__(self, needs: Mapping[str, float]) -> None:
        self._actor = _Actor.options(scheduling_strategy="SPREAD", **needs).remote(lark_fast.__version__)
        self.message, self.silent = self._actor.receive.remote(), True

    def send(self, pickled: bytes) -> None:
        """See ``Process``."""
        self._actor.send.remote(pickled)

    def receive(self) -> object:
        """See ``Process``."""
        try:
            said = ray.get(self.message)
        except RayError as error:
            raise LostProcessError(_how(error), killed=False) from None
        self.message, self.silent = self._actor.receive.remote(), False
        return pickle.loads(said)

    def kill(self) -> None:
        """See ``Process``."""
        ray.kill(self._actor)

    def wait(self) -> None:
        """See ``Process``. Ray sees to it."""


class Actors:
    """A ``Crew`` of actors.

    Args:
        needs: resources of each, as options of an actor.
    """

    def __init__(self, needs: Mapping[str, float]) -> None:
        self._needs, self._told = needs, False

    def name(self, number: int, device: str) -> str:
        """See ``Crew``."""
        return f"actor {number}"

    def beside(self, members: int) -> int:
        """See ``Crew``: as many as this node has GPUs."""
        own = ray.get_runtime_context().get_node_id()
        gpus = sum(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["NodeID"] == own)
        return min(members, gpus)

    def start(self, asked: Asked) -> _ActorProcess:
        """See ``Crew``. The cluster may have no room for it yet."""
        process = _ActorProcess(self._needs)
        process.send(pickle.dumps(asked))
        return process

    def speaking(self, processes: Sequence[_ActorProcess], seconds: float | None) -> list[_ActorProcess]:
        """See ``Crew``."""
        waited = {process.message: process for process in processes}
        if seconds is None and not self._told and all(process.silent for process in processes):
            self._told = True
            if not ray.wait(list(waited), timeout=PATIENCE_SECONDS)[0]:
                needs = " and ".join(
                    f"{needed:g} {name[4:-1].upper()}" for name, needed in self._needs.items() if needed
                )
                _say(f"waiting for actors to load the student; each takes {needs} of the Ray cluster (`ray status`)")
        if ray.wait(list(waited), timeout=seconds)[0]:
            there, _ = ray.wait(list(waited), num_returns=len(waited), timeout=0)
            return [waited[message] for message in there]
        return []


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connected to a cluster: as the caller is already, else to that address, or to what Ray finds or starts."""
    if ray.is_initialized():
        yield
        return
    # Ray prints what happens to its workers on stdout, which is for the summary; ``Team`` says what has to be known.
    with redirect_stdout(_Silence()):
        try:
            _refuse_unreachable(address or os.environ.get("RAY_ADDRESS"))
            with _own_signals(), _said_when_it_takes_long():
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            where = f"--ray-address {address}" if address else "--engine ray"
            reason = " ".join(str(error).split())[:300]
            token = "; where it asks for a token, set RAY_AUTH_MODE=token" if "RAY_AUTH_MODE" not in os.environ else ""
            raise UserError(f"{where}: no Ray cluster that can be used ({reason}){token}") from error
        try:
            yield
        finally:
            ray.shutdown()


def _refuse_unreachable(address: str | None) -> None:
    """Ray itself tries for a quarter of an hour."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


@contextmanager
def _said_when_it_takes_long() -> Iterator[None]:
    words = "waiting for the Ray cluster; --ray-address local starts one on this machine for the run"
    timer = threading.Timer(PATIENCE_SECONDS, _say, (words,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Silence(io.TextIOBase):
    """Where words go that nobody needs."""

    def write(self, text: str) -> int:
        """Forget it."""
        return len(text)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it is initialised; afterwards it is whose it was."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # elsewhere neither may
            signal.signal(signal.SIGTERM, handler)


def _how(error: RayError) -> str:
    """What happened to an actor, to follow its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ActorDiedError) and "creation task" in str(error):
        return f"could not be started ({lines[-1]})"
    return f"was lost ({type(error).__name__})"


def _say(text: str) -> Any:
    print(f"lark-fast: {text}", file=sys.stderr)
