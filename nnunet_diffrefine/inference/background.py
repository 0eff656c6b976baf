"""Work ahead of and behind the network in processes of their own, with a bounded number of cases in memory."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Here(Executor):
    """Runs at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401
        """A future that is done."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Background:
    """Processes for one kind of work.

    Args:
        processes: how many; 0 works in this process.
        flag: of the command line that sets the number, for messages.
    """

    def __init__(self, processes: int, flag: str) -> None:
        self.processes, self.flag = processes, flag
        self._pool: Executor = Here() if processes == 0 else _pool(processes)
        self._pending: deque[Future[Any]] = deque()

    def ahead(self, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Results in order, at most as many computed ahead as there are processes."""
        for one in arguments:
            self._pending.append(self._submit(function, *one))
            if len(self._pending) > self.processes:
                yield self._result()
        while self._pending:
            yield self._result()

    def behind(self, function: Callable[..., T], *arguments: Any) -> Iterator[T]:  # noqa: ANN401
        """Hand work over; yields results, in order, until no more wait than there are processes."""
        self._pending.append(self._submit(function, *arguments))
        while len(self._pending) > self.processes:
            yield self._result()

    def rest(self) -> Iterator[Any]:
        """The results not yet yielded."""
        while self._pending:
            yield self._result()

    def close(self) -> None:
        """Let go of the processes; work not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:  # noqa: ANN401
        try:
            return self._pool.submit(function, *arguments)
        except BrokenProcessPool as error:
            raise self._died() from error

    def _result(self) -> Any:  # noqa: ANN401
        try:
            return self._pending.popleft().result()
        except BrokenProcessPool as error:
            raise self._died() from error

    def _died(self) -> RuntimeError:
        return RuntimeError(
            f"A background process died, most likely for lack of memory. Use fewer of them ({self.flag} "
            f"{self.processes - 1}); --continue_prediction keeps what is done."
        )


def _pool(processes: int) -> Executor:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)


def _begin() -> None:
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A pool waits for work for ever if its parent is killed.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
