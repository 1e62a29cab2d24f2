"""Finding plugins, and holding each against the hooks before it is let in.

A plugin that cannot be loaded, or has a mistake in it that can be seen without calling it, is left out with a message
that names it, and the others work on: unless the user named it, or asked to be strict. What is seen: an API level
that is not ours or not said, a marked function that is no hook (misspelt), a hook that takes an argument it cannot
have, a function with the name of a hook that is not marked, a wrapper.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

import pluggy

from qcow2_plugin.adapters.backup import builtin, hookspecs
from qcow2_plugin.adapters.backup.hookspecs import API_LEVEL, CLASSES, PREFIX, PROJECT
from qcow2_plugin.errors import PluginError, printable

Report = Callable[[str], None]
"""Told what the user should know, a line each time."""
_LEVEL = "QCOW2_PLUGIN_API"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A plugin as `qcow2 plugins` shows it. `source` says where it comes from, `trouble` why it is not used."""

    name: str
    source: str
    version: str | None
    hooks: tuple[str, ...]
    trouble: str | None


class Plugins:
    """The plugins in use, `registry`, and all that were found, `listed`, in the order in which they came."""

    def __init__(self, report: Report, *, blocked: Collection[str], strict: bool) -> None:
        self.registry = pluggy.PluginManager(PROJECT)
        self.registry.add_hookspecs(hookspecs)
        self.listed: list[Listed] = []
        self.built_in: frozenset[str] = frozenset(builtin.PLUGINS)
        self._report = report
        self._blocked = frozenset(blocked)
        self._strict = strict
        for name, plugin in builtin.PLUGINS.items():
            self._add(name, "built in", None, partial(_itself, plugin), is_needed=True)

    def load_installed(self) -> None:
        """Those of the packages that are installed. Raises PluginError if strict."""
        for point in sorted(entry_points(group=PROJECT), key=lambda point: point.name):
            self._add(point.name, f"package {_package(point)}", _version(point), point.load, is_needed=self._strict)

    def load_named(self, names: Sequence[str]) -> None:
        """Modules by their dotted names, or files by a path (with a "/", or that ends in ".py").

        Raises PluginError for any that cannot be used.
        """
        for name in names:
            is_path = os.sep in name or name.endswith(".py")
            source = f"file {os.path.abspath(name)}" if is_path else f"module {name}"
            short = os.path.basename(name).removesuffix(".py") if is_path else name
            self._add(short, source, None, partial(_module_at if is_path else import_module, name), is_needed=True)

    def load_own(self, plugins: Mapping[str, object]) -> None:
        """Objects that the caller has, by their names. Raises PluginError for any that cannot be used."""
        for name, plugin in plugins.items():
            self._add(name, "given", None, partial(_itself, plugin), is_needed=True)

    def end(self) -> None:
        """All are loaded. Raises PluginError if one of them has a hook that there is not."""
        try:
            self.registry.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(printable(str(error.plugin)), told(error)) from error
        for name in sorted(self._blocked - {listed.name for listed in self.listed}):
            self._report(f'there is no plugin "{printable(name)}" to block')

    def _add(self, name: str, source: str, version: str | None, load: Callable[[], object], *, is_needed: bool) -> None:
        trouble: str | None = "blocked"
        hooks: tuple[str, ...] = ()
        if name not in self._blocked:
            trouble, hooks = self._registered(name, load)
            if trouble is not None:
                error = PluginError(name, f"from {printable(source)} cannot be used: {trouble}")
                if is_needed:
                    raise error
                self._report(f"{error}; it is left out")
        self.listed.append(Listed(name=name, source=source, version=version, hooks=hooks, trouble=trouble))

    def _registered(self, name: str, load: Callable[[], object]) -> tuple[str | None, tuple[str, ...]]:
        """What speaks against the plugin, None if it is registered now; the hooks that it has."""
        if self.registry.has_plugin(name):
            return "there is another one of that name", ()
        try:
            plugin = load()
            plugin = plugin() if inspect.isclass(plugin) else plugin
            if self.registry.is_registered(plugin):
                return "it is in use under another name already", ()
            trouble = _wrong_level(plugin) or next(_unmarked(plugin), None)
        except (Exception, SystemExit) as error:
            return told(error), ()
        if trouble is not None:
            return trouble, ()
        try:
            self.registry.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            if self.registry.is_registered(plugin):  # older pluggy stops in the middle of registering it
                self.registry.unregister(plugin)
            return " ".join(printable(line.strip()) for line in str(error).splitlines()), ()
        callers = self.registry.get_hookcallers(plugin) or []
        hooks = tuple(sorted(caller.name for caller in callers))
        trouble = next(_misspelt(hooks), None) or next(self._wrappers(name), None)
        if trouble is not None:
            self.registry.unregister(plugin)
        return trouble, hooks

    def _wrappers(self, name: str) -> Iterator[str]:
        for hook in CLASSES:
            for each in getattr(self.registry.hook, hook).get_hookimpls():
                if each.plugin_name == name and (each.hookwrapper or each.wrapper):
                    yield f"{hook} is a wrapper, and there are none here"


def _itself(plugin: object) -> object:
    return plugin


def _wrong_level(plugin: object) -> str | None:
    level = getattr(plugin, _LEVEL, None)
    if level is None:
        return f"it does not say for which hooks it was written; give it a line {_LEVEL} = {API_LEVEL}"
    if level != API_LEVEL or isinstance(level, bool):
        return f"it was written for level {printable(repr(level))} of the hooks, and these are of level {API_LEVEL}"
    return None


def _unmarked(plugin: object) -> Iterator[str]:
    for name in CLASSES:
        function = getattr(plugin, name, None)
        if callable(function) and not hasattr(function, f"{PROJECT}_impl"):
            yield f"its function {name} is not marked with @hookimpl, so nobody would call it"


def _misspelt(hooks: Sequence[str]) -> Iterator[str]:
    for hook in hooks:
        if hook not in CLASSES:
            near = difflib.get_close_matches(hook, CLASSES, 1)
            yield f"there is no hook {printable(hook)}" + (f"; is it {near[0]}?" if near else "")


def _module_at(path: str) -> ModuleType:
    name = f"{PREFIX}file_{os.path.basename(path).removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, os.path.abspath(path))
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def told(error: BaseException) -> str:
    """An exception in a line."""
    try:
        words = str(error)
    except Exception:  # of a class that somebody else has written
        words = ""
    return f"{type(error).__name__}: {printable(words)}" if words else type(error).__name__


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown"


def _version(point: EntryPoint) -> str | None:
    return point.dist.version if point.dist is not None else None
