"""Work done by several threads whose results are wanted one after the other, as if one had done it all.

No more is begun than is wanted soon: what is done and was not asked for yet is bounded by twice the threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], threads: int) -> Generator[Result, None, None]:
    """What `work` makes of each task, in their order.

    Raises what `work` or `tasks` do, when it comes to the place. When the iterator has ended, or is closed, no thread
    works any more. Where there is no room for a thread, the caller's does the work, and a task may be worked on twice.
    """
    ahead = 2 * threads
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                begun.append(_begin(pool, work, task))
                if len(begun) > ahead:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


def _begin(pool: ThreadPoolExecutor, work: Callable[[Task], Result], task: Task) -> Future[Result]:
    try:
        return pool.submit(work, task)
    except RuntimeError:  # no thread could be started
        done: Future[Result] = Future()
        try:
            done.set_result(work(task))
        except BaseException as error:
            done.set_exception(error)
        return done
