"""Calling hooks: one plugin at a time, so that a failure has the name of who failed.

`ask` calls one plugin, and says so while it takes too long: a call that a job waits for cannot be cut short without
leaving the plugin in the middle of what it does. `Observer` is for those that no job waits for: each such plugin has a
thread, which is given up when a call in it does not end.

What a plugin raises becomes a PluginError that names it and the hook. The built-in plugins' errors stay as they are.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pluggy

from qcow2_plugin.adapters.backup.plugins import Plugins, Report, told
from qcow2_plugin.errors import PluginError, Qcow2Error

SLOW = 30.0
"""Seconds after which a plugin that a job waits for is told of."""
OBSERVER_LIMIT = 10.0
"""Seconds that an observer may take for one call."""
MAX_FAILURES = 3
"""Of an observer, before it is muted."""
MAX_WAITING = 1000
"""Calls that wait for a slow observer."""


class Asked(NamedTuple):
    """A plugin that has a hook."""

    plugin: str
    call: Callable[..., Any]


class Calls:
    """How the hooks of `plugins` are called. `report` is told of what does not end a job. Threads may share it."""

    def __init__(self, plugins: Plugins, report: Report, *, slow: float, observer_limit: float) -> None:
        self._plugins = plugins
        self._report = report
        self._slow = slow
        self._observer_limit = observer_limit
        self._asked: dict[str, list[Asked]] = {}
        self._observers: dict[str, _Observer] = {}
        self._lock = threading.Lock()

    def asked(self, hook: str) -> list[Asked]:
        """The plugins that have `hook`, in the order in which they are called: the built-in ones last."""
        known = self._asked.get(hook)
        if known is None:
            registry = self._plugins.registry
            known = [
                Asked(each.plugin_name, registry.subset_hook_caller(hook, _all_but(each.plugin, registry)))
                for each in reversed(getattr(registry.hook, hook).get_hookimpls())
            ]
            known.sort(key=lambda asked: asked.plugin in self._plugins.built_in)
            self._asked[hook] = known
        return known

    def ask(self, hook: str, asked: Asked, **arguments: Any) -> Any:
        """The answer of one plugin. Raises PluginError; what it raised, if it is a built-in one."""
        with self._watched(hook, asked.plugin):
            try:
                return asked.call(**arguments)
            except (Exception, SystemExit) as error:
                if asked.plugin in self._plugins.built_in:
                    raise
                raise failure(asked.plugin, hook, error) from error

    def first(self, hook: str, **arguments: Any) -> tuple[Any, str | None]:
        """The first answer that is not None, and whose it is; None twice if there is none. Raises as `ask`."""
        for asked in self.asked(hook):
            answer = self.ask(hook, asked, **arguments)
            if answer is not None:
                return answer, asked.plugin
        return None, None

    def tell(self, hook: str, *, may_miss: bool = False, **arguments: Any) -> None:
        """Tell the observers in the background; those that do not keep up miss what they `may_miss`."""
        for asked in self.asked(hook):
            self._observer(asked.plugin).tell(hook, asked.call, arguments, may_miss=may_miss)

    def close(self) -> None:
        """Wait until the observers have heard everything, but not for those that take too long."""
        with self._lock:
            observers, self._observers = list(self._observers.values()), {}
        for observer in observers:
            observer.close()

    def _observer(self, plugin: str) -> _Observer:
        with self._lock:
            if plugin not in self._observers:
                self._observers[plugin] = _Observer(plugin, self._report, self._observer_limit)
            return self._observers[plugin]

    @contextmanager
    def _watched(self, hook: str, plugin: str) -> Iterator[None]:
        timer = threading.Timer(
            self._slow, self._report, (f'waiting for plugin "{plugin}" in {hook} for {self._slow:g} seconds now',)
        )
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class _Call(NamedTuple):
    hook: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    may_miss: bool


class _Observer:
    """One plugin that is told things in a thread of its own."""

    def __init__(self, plugin: str, report: Report, limit: float) -> None:
        self._plugin = plugin
        self._report = report
        self._limit = limit
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._running: str | None = None
        self._since = 0.0
        self._failures = 0
        self._missed = 0
        self._is_muted = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def tell(self, hook: str, call: Callable[..., Any], arguments: dict[str, Any], *, may_miss: bool) -> None:
        with self._changed:
            self._mute_if_late()
            if self._is_muted or self._is_closed:
                return
            if may_miss and len(self._waiting) >= MAX_WAITING:
                self._missed += 1
                return
            self._waiting.append(_Call(hook, call, arguments, may_miss))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"plugin {self._plugin}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for what it was told: as long as calls end in time, and for what it may miss no longer than for one."""
        end = time.monotonic() + self._limit
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            while (self._waiting or self._running) and not self._is_muted:
                if time.monotonic() > end:
                    self._skip()
                self._changed.wait(max(self._since + self._limit - time.monotonic(), 0.01))
                self._mute_if_late()
        if self._missed:
            self._report(f'plugin "{self._plugin}" was too slow to be told of {self._missed} events')

    def _skip(self) -> None:
        """Nothing that it may miss waits any more."""
        kept = [waiting for waiting in self._waiting if not waiting.may_miss]
        self._missed += len(self._waiting) - len(kept)
        self._waiting = deque(kept)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed or self._is_muted)
                if self._is_muted or not self._waiting:
                    return
                told = self._waiting.popleft()
                self._running, self._since = told.hook, time.monotonic()
            self._call(told)
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _call(self, told: _Call) -> None:
        try:
            told.call(**told.arguments)
        except (Exception, SystemExit) as error:
            self._report(f"{failure(self._plugin, told.hook, error)}; the job goes on")
            self._failures += 1
            if self._failures == MAX_FAILURES:
                with self._changed:
                    self._mute(f"failed {MAX_FAILURES} times")

    def _mute_if_late(self) -> None:
        if self._running and not self._is_muted and time.monotonic() > self._since + self._limit:
            self._mute(f"did not come back from {self._running} within {self._limit:g} seconds")

    def _mute(self, reason: str) -> None:
        if not self._is_muted:
            self._is_muted = True
            self._waiting.clear()
            self._report(f'plugin "{self._plugin}" {reason}; it is told nothing more')


def failure(plugin: str, hook: str, error: BaseException) -> PluginError:
    """The error of an operation that a plugin made fail; its errno, if it has one."""
    made = PluginError(plugin, f"failed in {hook}: {told(error)}")
    made.errno = (error.errno if isinstance(error, OSError | Qcow2Error) else None) or errno.EIO
    return made


def _all_but(kept: object, registry: pluggy.PluginManager) -> list[object]:
    return [plugin for plugin in registry.get_plugins() if plugin is not kept]
