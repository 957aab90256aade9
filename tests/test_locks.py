"""One writer per place: of two processes one has the lock, of a killed one nobody, and nothing of it is left."""

import os
import signal
import time

import pytest
from processes import fork
from ranks import on_ranks

from harness import locks


@pytest.fixture(autouse=True)
def released():
    yield
    locks.release()


def test_a_second_process_is_refused_and_told_who_writes(tmp_path):
    lock = tmp_path / "out/.lock"
    locks.hold(lock, "--output-dir out")

    def second():
        try:
            locks.hold(lock, "--output-dir out")
        except locks.LockedError as error:
            who = f"process {os.getppid()} on {os.uname().nodename}, since 20"
            assert str(error).startswith(f"--output-dir out is being written by another run ({who}")
            os._exit(7)

    assert fork(second) == 7
    locks.release()
    assert not (tmp_path / "out").exists(), "it was made for the lock"
    assert fork(second) == 0


def test_of_a_killed_process_nothing_is_held_and_it_is_said(tmp_path):
    lock, said, killed = tmp_path / ".lock", [], []

    def be_killed():
        locks.hold(lock, "here")
        os.kill(os.getpid(), signal.SIGKILL)

    assert fork(be_killed) == -signal.SIGKILL and lock.exists()
    locks.hold(lock, "here", said.append)
    assert len(said) == 1 and said[0].startswith("here: the run before (process ")
    assert said[0].endswith("was killed; its lock is taken over")
    locks.release(lock)
    locks.hold(lock, "here", killed.append)
    assert not killed, "a lock that was given back says nothing"


def test_what_a_killed_process_left_goes_and_what_is_held_stays(tmp_path):
    lock = tmp_path / ".lock"
    locks.hold(lock, "here")
    assert fork(lambda: locks.clear(lock)) == 0 and lock.exists()
    locks.release()
    lock.write_text("{}")
    locks.clear(lock)
    assert not lock.exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 5000, b"7", b'{"host": "h"}'])
def test_whatever_stands_in_a_lock_file_nobody_holds_it(content, tmp_path):
    (tmp_path / ".lock").write_bytes(content)
    locks.hold(tmp_path / ".lock", "here", pytest.fail)


def test_what_a_user_has_put_into_the_folder_stays(tmp_path):
    locks.hold(tmp_path / "a/b/.lock", "here")
    (tmp_path / "a/notes.txt").write_text("mine")
    locks.release()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "notes.txt"]


def test_who_waits_has_it_next(tmp_path):
    """Of four processes that count in a file, one at a time, none reads what another is about to write."""
    lock, count = tmp_path / ".lock", tmp_path / "count"
    count.write_text("0")
    codes, said = on_ranks(count_up, (lock, count), 4, tmp_path / "ranks")
    assert codes == [0] * 4, said
    assert count.read_text() == "100" and not lock.exists()


def count_up(lock, count):
    for _ in range(25):
        locks.hold(lock, "here", waits=True)
        number = int(count.read_text())
        time.sleep(0.001)
        count.write_text(str(number + 1))
        locks.release()
