"""The worker of the explorer: the latest request wins, and it can be closed."""

import threading

import pytest

from cpnb._explorer.background import LatestWins

LONG = 30  # seconds; a test that waits this long has failed


class Recorder:
    """Work that waits at a gate, and a record of what ran and came out."""

    def __init__(self):
        self.gate, self.entered = threading.Event(), threading.Event()
        self.worked, self.outcomes = [], []

    def work(self, item):
        self.worked.append(item)
        self.entered.set()
        assert self.gate.wait(LONG)
        if item == "bad":
            raise ValueError("no such thing")
        return str(item).upper()

    def done(self, item, outcome):
        self.outcomes.append((item, outcome))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def worker(recorder):
    worker = LatestWins(recorder.work, recorder.done)
    yield worker
    recorder.gate.set()
    worker.close()


def test_latest_wins_drops_requests_that_were_overtaken(worker, recorder):
    worker.request("a")
    assert recorder.entered.wait(LONG)
    for item in "bcdefgh":
        worker.request(item)
    assert recorder.worked == ["a"]
    recorder.gate.set()
    assert worker.wait(LONG)
    assert recorder.outcomes == [("a", "A"), ("h", "H")]


def test_latest_wins_wake_drops_the_waiting_request(worker, recorder):
    worker.request("a")
    assert recorder.entered.wait(LONG)
    worker.request("b")
    worker.wake()
    recorder.gate.set()
    assert worker.wait(LONG)
    worker.request("c")
    assert worker.wait(LONG)
    assert recorder.worked == ["a", "c"]


def test_latest_wins_hands_over_errors_and_goes_on(worker, recorder):
    recorder.gate.set()
    worker.request("bad")
    assert worker.wait(LONG)
    ((item, error),) = recorder.outcomes
    assert item == "bad" and isinstance(error, ValueError)
    worker.request("good")
    assert worker.wait(LONG)
    assert recorder.outcomes[1] == ("good", "GOOD")


def test_latest_wins_outlives_an_error_of_its_callbacks(recorder, monkeypatch):
    said = []
    monkeypatch.setattr(threading, "excepthook", said.append)

    def done(item, outcome):
        if item == "first":
            raise ValueError("cannot be shown")
        recorder.done(item, outcome)

    recorder.gate.set()
    worker = LatestWins(recorder.work, done)
    worker.request("first")
    assert worker.wait(LONG)
    worker.request("second")
    assert worker.wait(LONG)
    worker.close()
    assert recorder.outcomes == [("second", "SECOND")]
    assert [str(seen.exc_value) for seen in said] == ["cannot be shown"]


def test_latest_wins_starts_its_thread_with_the_first_request(worker, recorder):
    assert not worker.alive
    worker.request("a")
    assert worker.alive
    (thread,) = [t for t in threading.enumerate() if t.name == "cpnb-latest-wins"]
    assert thread.daemon


def test_latest_wins_wait_says_when_time_is_up(worker, recorder):
    assert worker.wait(0)
    worker.request("a")
    assert not worker.wait(0)


def test_latest_wins_close_ends_the_thread_and_lands_nothing_more(worker, recorder):
    worker.request("a")
    assert recorder.entered.wait(LONG)
    worker.close(timeout=0)  # the work is still at the gate
    recorder.gate.set()
    worker.close(LONG)
    assert not worker.alive
    worker.request("b")
    assert not worker.alive
    assert recorder.worked == ["a"] and recorder.outcomes == []


def test_latest_wins_prepares_ahead_when_idle_until_nothing_is_left(recorder):
    todo, finished = ["x", "y"], threading.Event()

    def ahead():
        if not todo:
            finished.set()
            return None
        return todo.pop(0)

    recorder.gate.set()
    worker = LatestWins(recorder.work, recorder.done, ahead)
    worker.request("a")
    assert finished.wait(LONG)
    assert recorder.worked == ["a", "x", "y"]
    todo.append("z")
    finished.clear()
    worker.wake()
    assert finished.wait(LONG)
    worker.close()
    assert recorder.worked == ["a", "x", "y", "z"]


def test_latest_wins_works_in_the_call_when_not_in_the_background(recorder):
    recorder.gate.set()
    worker = LatestWins(recorder.work, recorder.done, lambda: "x", background=False)
    worker.request("a")
    worker.wake()
    assert recorder.outcomes == [("a", "A")]
    assert not worker.alive and worker.wait(0)
    worker.close()
    worker.request("b")
    assert recorder.worked == ["a"]
