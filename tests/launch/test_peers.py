"""Processes that watch each other, as threads of this one: sockets are real, ending is recorded."""

import json
import os
import queue
import socket
import threading

import pytest

from launch import peers
from launch.peers import Line, Peers
from maxlike.errors import TRY_AGAIN, UserError


class Job:
    """Process 0 and the lines of the others to it, met on a free port; `ends` gets (process, sentence, code)."""

    def __init__(self, processes, *, watched, silence=60.0):
        self.listener = peers.listen(0)
        self.port = self.listener.getsockname()[1]
        self.ends = queue.Queue()
        gathered = queue.Queue()
        meet = threading.Thread(
            target=lambda: gathered.put(peers.gather(self.listener, processes, 30.0, lambda sentence: None))
        )
        meet.start()
        self.lines = {i: peers.reach("localhost", self.port, i, processes, 30.0) for i in range(1, processes)}
        here = gathered.get()
        meet.join()
        assert sorted(here) == list(range(1, processes))
        for line in here.values():
            line.send(host="headnode", pid=7)
        for line in self.lines.values():
            peers.answer(line, "headnode", 30.0)
        self.heads = here
        self.watches = {i: self._watch(i, {0: self.lines[i]} if i else here, processes, silence) for i in watched}

    def _watch(self, process, lines, processes, silence):
        def stop(sentence, code):
            self.ends.put((process, sentence, code))

        return Peers(lines, processes=processes, silence=silence, stop=stop)

    def end(self):
        return self.ends.get(timeout=30.0)

    def close(self):
        for watch in self.watches.values():
            watch.leave(1)  # which, unlike 0, ends the watch
        self.listener.close()


def vanish(line: Line) -> None:
    """What the kernel does to the connections of a killed process."""
    line.connection.shutdown(socket.SHUT_RDWR)


def test_a_process_that_vanishes_is_named_to_all_others():
    job = Job(4, watched=[0, 1, 3])
    vanish(job.lines[2])
    ends = sorted(job.end() for _ in range(3))
    assert [end[0] for end in ends] == [0, 1, 3]
    for _, sentence, code in ends:
        assert code == TRY_AGAIN
        assert sentence.startswith(f"process 2 (pid {os.getpid()} on {socket.gethostname()}) of 4 is gone")
    job.close()


def test_the_end_of_process_0_is_noticed_by_all():
    job = Job(3, watched=[1, 2])
    for line in job.heads.values():
        vanish(line)
    ends = [job.end() for _ in range(2)]
    assert sorted((process, sentence.split(" of ")[0]) for process, sentence, _ in ends) == [
        (process, "process 0 (pid 7 on headnode)") for process in (1, 2)
    ]
    job.close()


def test_a_goodbye_is_no_loss_and_an_error_is_passed_on():
    job = Job(3, watched=[0, 1])
    job.lines[2].send(left=0, why="")
    vanish(job.lines[2])
    job.watches[1].leave(2, "the disk is full: free some")
    process, sentence, code = job.end()
    assert (process, code) == (0, 2)
    assert "stopped with exit code 2: the disk is full: free some" in sentence
    assert job.ends.empty()
    job.close()


def test_a_process_on_its_way_out_still_learns_who_it_waits_for():
    job = Job(3, watched=[0, 1])
    job.watches[1].leave(0)
    vanish(job.lines[2])
    ends = sorted(job.end() for _ in range(2))
    assert [(process, code) for process, _, code in ends] == [(0, TRY_AGAIN), (1, TRY_AGAIN)]
    assert all(sentence.startswith("process 2 ") for _, sentence, _ in ends)
    job.close()


def test_a_silent_process_is_given_up():
    job = Job(2, silence=0.4, watched=[0])
    process, sentence, code = job.end()
    assert (process, code) == (0, TRY_AGAIN)
    assert sentence.startswith("process 1 ") and "has not been heard of for" in sentence
    job.close()


def test_strangers_and_doubles_are_refused_and_told():
    said = queue.Queue()
    gathered = queue.Queue()
    with peers.listen(0) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=lambda: gathered.put(peers.gather(listener, 3, 30.0, said.put))).start()
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert "does not come from a process of this job" in json.loads(stranger.recv(1000))["refused"]
        with pytest.raises(UserError, match="started with --processes 5 and process 0 with 3: give both the same"):
            peers.answer(peers.reach("localhost", port, 1, 5, 30.0), "there", 30.0)
        lines = [peers.reach("localhost", port, 1, 3, 30.0)]
        with pytest.raises(UserError, match=r"has the index of process 1 \(pid .*\): give each its own --process"):
            peers.answer(peers.reach("localhost", port, 1, 3, 30.0), "there", 30.0)
        lines.append(peers.reach("localhost", port, 2, 3, 30.0))
        assert sorted(gathered.get(timeout=30.0)) == [1, 2]
        assert said.qsize() == 3
        for line in lines:
            line.connection.close()


def test_a_coordinator_that_cannot_be_reached_or_is_another_program():
    with peers.listen(0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"localhost:{port} gave no answer in 0.2 s"):
            peers.answer(peers.reach("localhost", port, 1, 2, 5.0), f"localhost:{port}", 0.2)
        line = peers.reach("localhost", port, 1, 2, 5.0)
        waiting = listener.accept()[0]  # the first caller, who has given up
        other = listener.accept()[0]
        other.sendall(b"HTTP/1.0 400 Bad request\r\n")
        with pytest.raises(UserError, match=r"is not process 0 of this job: correct --coordinator"):
            peers.answer(line, f"localhost:{port}", 5.0)
        for connection in (waiting, other):
            connection.close()
    with pytest.raises(UserError, match=rf"localhost:{port} could not be reached in 0.2 s .*: start process 0 there"):
        peers.reach("localhost", port, 1, 2, 0.2)
    with peers.listen(0) as taken, pytest.raises(UserError, match=r"cannot listen on port .*name another"):
        peers.listen(taken.getsockname()[1])
