"""Joining the processes of a cluster. This decides whether there are several, tells in a sentence who is missing, and
keeps watch over those who came; where neither flags nor Slurm say who they are, jax.distributed finds them."""

import json
import os
import re
import socket
import sys
import threading
import time

from launch import environment, peers
from maxlike.errors import UserError

JOIN_TIMEOUT = 300.0  # seconds
NEAR = 16  # ports after --coordinator's that are tried for jax's own service
_LATER = 30  # seconds by which jax is told to wait longer than we do: out of time, it aborts the process in C++
_ECHO = 2 * peers.GRACE  # seconds within which the watch explains an error that is the echo of another process's end

_watch: peers.Peers | None = None


def join(coordinator: str | None, processes: int | None, process: int | None, timeout: float = JOIN_TIMEOUT) -> None:
    """Initialises jax.distributed where flags ask for it or the environment shows several processes.

    timeout: seconds to wait for the other processes. Raises UserError where they cannot be reached or do not come.
    """
    if timeout <= 0:
        raise UserError(f"--join_timeout={timeout:g}: give a positive number of seconds")
    explicit = (coordinator, processes, process)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise UserError("--coordinator, --processes and --process go together: give all three, on every host")
        _meet(coordinator, processes, process, timeout)
    elif "SLURM_STEP_NODELIST" in os.environ and _count("SLURM_NTASKS") > 1:
        _meet(_slurm_address(), _count("SLURM_NTASKS"), _count("SLURM_PROCID"), timeout)
    elif environment.platform() == "tpu" or _count("OMPI_COMM_WORLD_SIZE") > 1:  # a TPU's metadata say if it is alone
        _meet_through_jax(timeout)
    elif _count("SLURM_NTASKS") > 1:
        _say(f"one process alone in an allocation of {os.environ['SLURM_NTASKS']} tasks: `srun` starts them all")


def joined() -> bool:
    """Whether this process is one of several."""
    return _watch is not None


def leave(code: int, why: str = "") -> None:
    """Says goodbye to the other processes, if there are any. With an error code it also ends this process: jax's own
    way out waits minutes for the others."""
    if _watch is None:
        return
    _watch.leave(code, why)
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def await_cause() -> None:
    """Called with an unexpected error at hand: gives the watch, which ends this process, the time to find out that
    another process's end caused it."""
    if _watch is not None:
        time.sleep(_ECHO)


def _count(name: str) -> int:
    """A number that a scheduler has put into the environment, 0 without one."""
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 0


def _slurm_address() -> str:
    """Where the processes of a Slurm step meet: on its first node, at one of 750 ports for each step, with room for
    `NEAR` others behind it, since neighbouring jobs share nodes."""
    nodes = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"])  # node[7-9,12],other -> node7,other
    step = _count("SLURM_JOB_ID") + _count("SLURM_STEP_ID")
    return f"{nodes.partition(',')[0]}:{20_000 + step % 750 * NEAR}"


def _initialize(timeout: float, late: str, **processes: object) -> None:
    """jax.distributed.initialize. It aborts the process in C++ where somebody is missing, so after `timeout` seconds
    another thread says the sentence `late` and ends the process. Raises UserError where jax cannot tell who is who."""
    import jax

    # jax would catch SIGTERM from here on, also before the training loop listens for it: nobody would hear it then.
    jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(timeout, _end_late, [late])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**processes, initialization_timeout=round(timeout) + _LATER)
    except ValueError as error:
        raise UserError(
            f"jax.distributed cannot tell who the processes of this job are ({error}): name them with --coordinator, "
            "--processes and --process, on a host alone --coordinator localhost:1234 --processes 1 --process 0"
        ) from None
    finally:
        timer.cancel()


def _end_late(sentence: str) -> None:
    _say(sentence)
    os._exit(2)


def _meet(coordinator: str, processes: int, process: int, timeout: float) -> None:
    """All processes meet at process 0, on the port of --coordinator; jax's own service gets a free port near it, and is
    started when all are there. It aborts the process in C++ where somebody is missing, so it is asked only then."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 - NEAR:
        raise UserError(f"--coordinator={coordinator!r}: give HOST:PORT of process 0, such as node1:1234")
    if not 0 <= process < processes:
        raise UserError(f"--process={process}: with --processes {processes} it is from 0 to {processes - 1}")
    if process == 0:
        lines = _gather(host, int(port), processes, timeout)
        near = _free_port(int(port))
        me = peers.myself(0)
        for line in lines.values():
            line.send(host=me.host, pid=me.pid, service=near)
    else:
        line = peers.reach(host.strip("[]"), int(port), process, processes, timeout)
        near = int(peers.answer(line, coordinator, timeout + 10)["service"])  # process 0 names the missing before that
        lines = {0: line}
    _start_watch(lines, processes)
    late = f"jax's service at {host}:{near} could not be reached in {timeout:g} s: let this host through to that port"
    _initialize(timeout, late, coordinator_address=f"{host}:{near}", num_processes=processes, process_id=process)


def _gather(host: str, port: int, processes: int, timeout: float) -> dict[int, peers.Line]:
    with peers.listen(port) as listener:
        lines = peers.gather(listener, processes, timeout, _say)
    missing = [str(process) for process in range(1, processes) if process not in lines]
    if missing:
        sentence = (
            f"waited {timeout:g} s at {host}:{port} for process {', '.join(missing)} of {processes}: start every one "
            "with the same --coordinator and --processes, each with its own --process"
        )
        for line in lines.values():
            line.send(refused=sentence)
        raise UserError(sentence)
    return lines


def _free_port(port: int) -> int:
    """The first free port after `port`."""
    for candidate in range(port + 1, port + NEAR):
        try:
            peers.listen(candidate).close()
            return candidate
        except UserError:
            continue
    raise UserError(f"the ports {port + 1} to {port + NEAR - 1} are all taken: name another one with --coordinator")


def _meet_through_jax(timeout: float) -> None:
    """Where jax finds the processes by itself, they learn from a first collective where process 0 listens."""
    _initialize(
        timeout,
        f"waited {timeout:g} s for all the processes that the TPU's metadata or mpirun speak of: start the same "
        "command on every worker, process 0 among them, and look at what the others say",
    )
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    process, processes = jax.process_index(), jax.process_count()
    if processes == 1:
        return
    listener = peers.listen(0)
    address = [_outward_address(), socket.gethostname(), listener.getsockname()[1]]
    told = np.frombuffer(json.dumps(address).encode().ljust(512), np.uint8)
    outward, name, port = json.loads(bytes(multihost_utils.broadcast_one_to_all(told)))
    with listener:
        if process == 0:
            lines = peers.gather(listener, processes, peers.SILENCE, _say)
            absent = [str(other) for other in range(1, processes) if other not in lines]
            if absent:
                _say(f"no connection from process {', '.join(absent)}: should it vanish, jax tells after 100 s")
            me = peers.myself(0)
            for line in lines.values():
                line.send(host=me.host, pid=me.pid)
        else:
            lines = {}
            for host in (outward, name):
                try:
                    line = peers.reach(host, port, process, processes, peers.SILENCE / 4)
                    peers.answer(line, f"{host}:{port}", 2 * peers.SILENCE)
                    lines = {0: line}
                    break
                except UserError as error:
                    _say(f"process {process} cannot watch the others: {error}")
    _start_watch(lines, processes)


def _outward_address() -> str:
    """The address of the interface that leads out of this host; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation, RFC 5737
            return probe.getsockname()[0]
        except OSError:
            return "localhost"


def _start_watch(lines: dict[int, peers.Line], processes: int) -> None:
    global _watch
    _watch = peers.Peers(lines, processes=processes)


def _say(sentence: str) -> None:
    print(f"maxlike: {sentence}", file=sys.stderr, flush=True)
