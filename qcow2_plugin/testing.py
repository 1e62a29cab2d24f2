"""For authors of plugins: tests that hold what they write to what backups rely on.

A test of a target is one line: `check_target(lambda: TapeTarget("tape0"))`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory

from qcow2_plugin.adapters.backup.target import BackupTarget
from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.storage.blobs import read_blob, write_blob

_PUT = "qcow2-check.a-2_x"
_PUBLISHED = "qcow2-check.1.json"
_MEBIBYTE = 1 << 20


def check_target(factory: Callable[[], BackupTarget]) -> None:
    """Hold the target that `factory` opens to what `BackupTarget` says.

    `factory` is called several times and must open the same place each time. It may hold other blobs, none of them
    called qcow2-check...; what this makes is removed again, unless a rule is broken. Takes as long as some twenty calls
    of the target. Raises AssertionError, whose text says which rule is broken.
    """
    with _opened(factory) as target:
        _require(target.uri.isprintable(), "uri is printable")
        _refuses_names(target)
        for rule in (_keeps_what_is_put, _puts_all_or_nothing, _publishes_for_one):
            rule(target, factory)


def _keeps_what_is_put(target: BackupTarget, factory: Callable[[], BackupTarget]) -> None:
    content = os.urandom(3 * _MEBIBYTE + 17)
    pieces: list[bytes | memoryview] = [
        content[:1],
        b"",
        memoryview(content)[1 : _MEBIBYTE + 7],
        content[_MEBIBYTE + 7 :],
    ]
    target.put(_PUT, iter(pieces), len(content))
    with _opened(factory) as other:
        _require(_read(other, _PUT) == content, "get gives what was put, to whoever opens the target")
    if target.directory is not None:
        found = b"".join(read_blob(os.path.join(target.directory, _PUT)))
        _require(found == content, "what was put is a file of that name in `directory`")
    next(target.get(_PUT))  # who stops in the middle leaves nothing in the way
    with TemporaryDirectory(dir=target.directory) as directory:
        path = os.path.join(directory, "made")
        write_blob(path, [content[:-1]])
        target.put_file(_PUT, path)
    _require(_read(target, _PUT) == content[:-1], "put_file keeps the file, in the place of what has the name")


def _puts_all_or_nothing(target: BackupTarget, factory: Callable[[], BackupTarget]) -> None:
    """Over a blob that is there."""

    def failing() -> Iterator[bytes]:
        yield bytes(_MEBIBYTE)
        raise RuntimeError("the disk cannot be read")

    with _expected(RuntimeError, "put raises what its chunks raise"):
        target.put(_PUT, failing(), 2 * _MEBIBYTE)
    _require_nothing(factory, _PUT, "nothing has the name after the chunks of put raised")
    for size, wrong in ((_MEBIBYTE + 1, "fewer"), (_MEBIBYTE - 1, "more")):
        with _expected(Qcow2Error, f"put raises TargetError when {wrong} bytes come than announced"):
            target.put(_PUT, [bytes(_MEBIBYTE)], size)
        _require_nothing(factory, _PUT, f"nothing has the name after {wrong} bytes came than announced")


def _publishes_for_one(target: BackupTarget, factory: Callable[[], BackupTarget]) -> None:
    """Of several at the same moment, and then for nobody."""
    start = threading.Barrier(2)
    winners: list[bytes] = []

    def publish(own: BackupTarget, content: bytes) -> None:
        start.wait()
        with suppress(FileExistsError, Qcow2Error):  # who fails has not published
            own.publish(_PUBLISHED, content)
            winners.append(content)

    with _opened(factory) as first, _opened(factory) as second:
        contents = {b'{"racer": 1}': first, b'{"racer": 2}': second}
        racers = [threading.Thread(target=publish, args=(own, content)) for content, own in contents.items()]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
    _require(len(winners) <= 1, "of those who publish one name at the same moment at most one succeeds")
    if not winners:
        winners.append(b'{"racer": null}')
        target.publish(_PUBLISHED, winners[0])
    with _opened(factory) as other, _expected(FileExistsError, "publish raises FileExistsError if the name is there"):
        other.publish(_PUBLISHED, b'{"second": true}')
    _require(_read(target, _PUBLISHED) == winners[0], "what the first published stays as it is")
    target.put(_PUT, [b"content"], 7)
    names = target.names()
    _require(names == sorted(names), "names are sorted")
    _require({_PUT, _PUBLISHED} <= set(names), "names tells what was put and published, as it was called")
    for name in (_PUT, _PUBLISHED):
        target.remove(name)
    target.remove(_PUT)  # which is done already
    _require_nothing(factory, _PUBLISHED, "nothing has the name after remove")
    _require(not {_PUT, _PUBLISHED} & set(target.names()), "names does not tell what was removed")


def _refuses_names(target: BackupTarget) -> None:
    for name in ("../qcow2-check.out", "/qcow2-check.out", "Qcow2", "-check", ".check", "", "a" * 202, "a\n"):
        for use in (_put_something, _publish_something, _read):
            with _expected(Qcow2Error, f"{name!r} is no name, as check_name finds"):
                use(target, name)


def _require(is_so: bool, rule: str) -> None:
    if not is_so:
        raise AssertionError(f"a target keeps this rule: {rule}")


def _require_nothing(factory: Callable[[], BackupTarget], name: str, rule: str) -> None:
    with _opened(factory) as target, _expected(FileNotFoundError, f"{rule}, so that get raises FileNotFoundError"):
        _read(target, name)


@contextmanager
def _expected(kind: type[Exception], rule: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"a target keeps this rule: {rule}; it raised {error!r}") from error
    raise AssertionError(f"a target keeps this rule: {rule}")


@contextmanager
def _opened(factory: Callable[[], BackupTarget]) -> Iterator[BackupTarget]:
    target = factory()
    try:
        yield target
    finally:
        target.close()


def _put_something(target: BackupTarget, name: str) -> None:
    target.put(name, [b"content"], 7)


def _publish_something(target: BackupTarget, name: str) -> None:
    target.publish(name, b"content")


def _read(target: BackupTarget, name: str) -> bytes:
    return b"".join(target.get(name))
