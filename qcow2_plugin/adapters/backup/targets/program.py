"""Running a backup program as a target's hands: what it reads, writes and says, and what its exit status is worth.

Owns the two traps of pipes. A program that reads from one cannot tell the end of its input from the death of who wrote
it: see `feed`. And a program that fails says so at the end only: nobody has read all of a `stream` before its exit
status was seen. Any status but 0 is a failure, that of a "warning" too.

A passphrase goes through a descriptor that the child inherits, never through arguments, environment or files.
"""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO

from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.errors import TargetError, printable
from qcow2_plugin.storage.blobs import readable_once

_CHUNK = 1 << 20
_LINE = 1 << 12
_LINES_KEPT = 4
_MOMENT = 5.0
"""Seconds."""
_TIME_TO_NOTICE, _TIME_TO_HEAR, _TIME_TO_STOP = 60.0, 0.5, 10.0
"""Seconds that a program has to clean up after itself when nobody wants its work any more: when it finds by itself that
something is missing, when it is interrupted, and when it first has to find that nobody reads."""


def without_password(location: str) -> str:
    """A place as it may be shown: "rest:https://me:secret@host/" is "rest:https://me@host/"."""
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1@", location)


class Program:
    """A program called `name`. With a passphrase, "{fd}" in the words that `start` it becomes the number of the
    descriptor to read it from; with a secret `place`, "{place}"."""

    def __init__(
        self, name: str, start: Sequence[str], passphrase: Secret | None = None, place: Secret | None = None
    ) -> None:
        self._name = name
        self._start = start
        self._secrets = {"{fd}": passphrase, "{place}": place}
        self._listed: dict[tuple[str, ...], tuple[float, bytes]] = {}

    def list(self, *more: str) -> bytes:
        """All that it writes, or wrote a moment ago, if it changed nothing for this object since: what a listing is
        worth when others can change what it lists. Raises TargetError."""
        when, listed = self._listed.get(more, (-_MOMENT, b""))
        if time.monotonic() - when < _MOMENT:
            return listed
        self._listed[more] = time.monotonic(), b"".join(self.stream(*more))
        return self._listed[more][1]

    def change(self, *more: str) -> None:
        """Let it do something. Raises TargetError."""
        with self._running(more, subprocess.DEVNULL, subprocess.DEVNULL) as running:
            running.require_success()

    def stream(self, *more: str) -> Iterator[bytes]:
        """What it writes, in chunks; it is stopped when nobody wants them any more. Raises TargetError, instead of the
        end, if it fails."""
        with self._running(more, subprocess.DEVNULL, subprocess.PIPE) as running:
            yield from running.output()
            running.require_success()

    def feed(self, *more: str, chunks: Iterable[bytes | memoryview], ending: bytes) -> None:
        """Let it read `chunks` and then `ending`, without which it knows that they are not whole, and fails: it does
        not get that if `chunks` raises. Raises TargetError if it fails, and whatever `chunks` raises."""
        with self._running(more, subprocess.PIPE, subprocess.DEVNULL) as running:
            try:
                running.write(chunks)
            except BaseException:
                running.cut_off()
                raise
            running.write([ending])
            running.require_success()

    def feed_or_kill(self, *more: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Let it read `chunks`. It takes the end of its input for the end of what it is to keep, so it is stopped
        before that if `chunks` raises. Raises TargetError if it fails, and whatever `chunks` raises."""
        with self._running(more, subprocess.PIPE, subprocess.DEVNULL) as running:
            running.write(chunks)
            running.require_success()

    def feed_file(self, *more: str, file: IO[bytes]) -> bytes:
        """All that it writes when it reads an open file, which is whole whatever becomes of this process. Raises
        TargetError if it fails."""
        with self._running(more, file, subprocess.PIPE) as running:
            written = b"".join(running.output())
            running.require_success()
            return written

    @contextmanager
    def _running(self, more: Sequence[str], stdin: int | IO[bytes], stdout: int) -> Iterator[_Running]:
        start, fds = list(self._start), []
        with ExitStack() as opened:
            for sign, secret in self._secrets.items():
                if secret is not None:
                    fds.append(opened.enter_context(readable_once(secret.reveal())))
                    start = [word.replace(sign, str(fds[-1])) for word in start]
            try:
                process = subprocess.Popen(
                    [*start, *more],
                    stdin=stdin,
                    stdout=stdout,
                    stderr=subprocess.PIPE,
                    pass_fds=fds,
                )
            except FileNotFoundError as error:
                raise TargetError(f"the program {self._name} is not installed here") from error
        running = _Running(process, f"{self._name} {more[0]}")
        try:
            yield running
        finally:
            running.stop()
            if stdin != subprocess.DEVNULL or stdout == subprocess.DEVNULL:  # it was not asked, but told
                self._listed.clear()


class _Running:
    """A process, and the last lines that it wrote to its standard error."""

    def __init__(self, process: subprocess.Popen[bytes], called: str) -> None:
        self._process = process
        self._called = called
        self._lines: deque[bytes] = deque(maxlen=_LINES_KEPT)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def write(self, chunks: Iterable[bytes | memoryview]) -> None:
        """Raises TargetError if the process does not want them, and whatever `chunks` raises."""
        pipe = self._process.stdin
        assert pipe is not None
        for chunk in chunks:
            try:
                pipe.write(chunk)
            except BrokenPipeError:
                self._end_input()
                self.require_success()
                raise TargetError(f"{self._called} did not read what it is to store") from None

    def output(self) -> Iterator[bytes]:
        """What it writes, until it stops."""
        assert self._process.stdout is not None
        while chunk := self._process.stdout.read(_CHUNK):
            yield chunk

    def require_success(self) -> None:
        """Give it the end of its input and wait for its own. Raises TargetError with what it said last."""
        self._end_input()
        status = self._process.wait()
        if status == 0:
            return
        self._listener.join(_TIME_TO_STOP)
        how = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
        said = " | ".join(printable(line.strip()) for line in self._lines if line.strip()) or "it said nothing"
        raise TargetError(f"{self._called} failed ({how}): {said}")

    def cut_off(self) -> None:
        """Give it the end of its input, and time to find that something is missing."""
        self._end_input()
        self._wait(_TIME_TO_NOTICE)

    def stop(self) -> None:
        """See that it is no more, by its own means if it can, before its input ends: it is interrupted; then, if it
        still wants to write, nobody is there to read."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._wait(_TIME_TO_HEAR)
        if self._process.stdout is not None:
            self._process.stdout.close()
        if not self._wait(_TIME_TO_STOP):
            self._process.kill()
            self._process.wait()
        self._end_input()
        self._listener.join(_TIME_TO_STOP)

    def _wait(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def _end_input(self) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as said:
            while line := said.readline(_LINE):
                self._lines.append(line)
