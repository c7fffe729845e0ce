"""A lock that waits, can be cancelled, refuses to wait for itself, and is free in copies and forks."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
import time
from contextlib import suppress

import pytest

from ascendit.errors import Cancelled, UsageError
from ascendit.exclusive import Exclusive, stop_if


def test_calls_of_two_threads_do_not_overlap() -> None:
    lock, inside, most = Exclusive("it"), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with lock.hold():
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == 1 and inside == 0


def test_a_call_inside_its_own_is_refused_and_the_lock_stays_usable() -> None:
    lock = Exclusive("the pipeline")
    with lock.hold():
        with pytest.raises(UsageError, match="the pipeline was called inside a run of its own") as error:
            with lock.hold():
                pass
        assert error.value.code == "E-USE-01"
    with lock.hold():
        pass


def test_a_waiting_call_can_be_cancelled() -> None:
    lock, held, release, cancel = Exclusive("it"), threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        with lock.hold():
            held.set()
            release.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    held.wait(30)
    threading.Timer(0.05, cancel.set).start()
    with pytest.raises(Cancelled), lock.hold(cancel):
        pass
    release.set()
    thread.join(30)
    with pytest.raises(Cancelled):
        stop_if(cancel)


def test_a_waiting_call_runs_its_check() -> None:
    lock, held, release = Exclusive("it"), threading.Event(), threading.Event()

    def work() -> None:
        with lock.hold():
            held.set()
            release.wait(30)

    def stop() -> None:
        raise Cancelled("cancelled", needs="nothing", fix="again")

    thread = threading.Thread(target=work)
    thread.start()
    held.wait(30)
    with pytest.raises(Cancelled), lock.hold(check=stop):
        pass
    release.set()
    thread.join(30)


def test_an_exception_releases_the_lock() -> None:
    lock = Exclusive("it")
    for failure in (ValueError, KeyboardInterrupt, SystemExit):
        with suppress(failure), lock.hold():
            raise failure
        with lock.hold():
            pass


def test_calls_that_share_a_value_overlap_and_others_are_refused() -> None:
    lock = Exclusive("the twin")
    with lock.hold(shared="a5"), lock.hold(shared="a5"):
        assert lock.shared == "a5"
        with pytest.raises(UsageError), lock.hold(shared="a2"):
            pass
    assert lock.shared is None


def test_copies_pickles_and_forks_are_free() -> None:
    lock = Exclusive("it")
    with lock.hold():
        for other in (copy.copy(lock), copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            with other.hold():
                pass
        child = multiprocessing.get_context("fork").Process(target=lambda: lock.hold().__enter__())
        child.start()
        child.join(30)
        assert child.exitcode == 0
