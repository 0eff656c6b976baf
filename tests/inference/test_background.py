"""Processes of their own: how many results they may hold, that one which dies is reported, and when they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from nnunet_diffrefine.inference import apply as module
from nnunet_diffrefine.inference import background
from nnunet_diffrefine.inference.background import Background
from tests.inference.small import Folders
from tests.inference.test_apply_command import run  # noqa: F401 (a fixture)

CASES = 12
PROCESSES = pytest.mark.parametrize("processes", [0, 1, 3])


@pytest.fixture
def threads(monkeypatch):
    """Threads instead of processes, which take seconds to start."""
    monkeypatch.setattr(background, "_pool", ThreadPoolExecutor)


class Alive:
    """Counts the objects that are in memory."""

    def __init__(self) -> None:
        self.most = self.now = 0

    def _gone(self) -> None:
        self.now -= 1

    def add(self, thing):
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(thing, self._gone)
        return thing


class Volume:
    def __init__(self, number: int) -> None:
        self.number = number


@PROCESSES
class TestBounds:
    def test_ahead_begins_no_more_than_it_may_and_holds_no_result(self, threads, processes):
        work, alive, begun = Background(processes, "-npp"), Alive(), []

        def arguments():
            for k in range(CASES):
                begun.append(k)
                yield (k,)

        for done, volume in enumerate(work.ahead(lambda k: alive.add(Volume(k)), arguments())):
            assert volume.number == done
            assert len(begun) <= done + 1 + processes
        work.close()
        assert done == CASES - 1
        assert alive.most <= processes + 2  # the one in use, and the one before it until it is replaced

    def test_behind_keeps_no_more_than_it_may(self, threads, processes):
        work, alive, found = Background(processes, "-nps"), Alive(), []
        for k in range(CASES):
            found += work.behind(lambda volume: volume.number, alive.add(Volume(k)))
            assert k + 1 - len(found) <= processes
        found += work.rest()
        work.close()
        assert found == list(range(CASES))
        assert alive.most <= processes + 2


@pytest.mark.parametrize("processes", [0, 2])
def test_memory_of_apply_does_not_grow_with_the_number_of_cases(tmp_path, run, threads, monkeypatch, processes):  # noqa: F811
    folders, prepared, finished = Folders(tmp_path), Alive(), Alive()
    for k in range(7):
        folders.add(f"case_{k}", k)
    prepare, refine = module.prepare, module.refine_case
    monkeypatch.setattr(module, "prepare", lambda *given: prepared.add(prepare(*given)))

    def counted(*given):
        done, result = refine(*given)
        return finished.add(done), result

    monkeypatch.setattr(module, "refine_case", counted)
    assert len(run(folders, npp=processes, nps=processes)) == 7
    assert prepared.most <= processes + 2
    assert finished.most <= processes + 2


def test_a_process_that_dies_is_reported_with_what_to_do():
    work = Background(1, "-npp")
    message = r"process died, most likely for lack of memory. Use fewer of them \(-npp 0\); --continue_prediction"
    with pytest.raises(RuntimeError, match=message):
        list(work.ahead(os._exit, [(1,)]))
    with pytest.raises(RuntimeError, match=message):
        list(work.behind(os.getpid))
    work.close()


SCRIPT = """
import os, time
from nnunet_diffrefine.inference.background import Background
print(next(Background(1, "-npp").ahead(os.getpid, [()])), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_processes_end_with_a_parent_that_is_killed():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}  # the killed one's semaphores are complained of
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], text=True, **pipes)
    child = int(parent.stdout.readline())
    assert runs(child)
    parent.kill()
    parent.wait()
    deadline = time.time() + 20
    while runs(child) and time.time() < deadline:
        time.sleep(0.05)
    parent.stdout.close()
    if runs(child):
        os.kill(child, signal.SIGKILL)
        pytest.fail("The process outlived its parent.")


def runs(pid: int) -> bool:
    """Whether a process is there and not a zombie, which only waits for its status to be read."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
