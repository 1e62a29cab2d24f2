"""The child process that has libguestfs: started, asked, bounded, ended.

libguestfs' Python module exists for the distribution's Python only, and what it parses was written by a guest. So it
works in a process of its own (`child`), one for each request:

* The request is JSON on its stdin. The answer is one line of JSON on its stdout, and bytes after it if it was asked
  for bytes. Not more than the limit is read, of what it says on stderr only the end is kept.
* It has a process group of its own, with QEMU in it, and a directory of its own for what it leaves lying about. When
  the answer is complete, when time is up or the limit reached, at Ctrl-C and at any error the group is killed and the
  directory removed.
* **KVM** is used where it works. Whether it does, only a launch can tell (there may be a /dev/kvm, and a CPU that
  cannot); where it fails at once the child launches again without, and this process remembers.

Refuses to know what the requests mean.
"""

from __future__ import annotations

import glob
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qcow2_plugin.adapters.guestfs.drive import Drive
from qcow2_plugin.adapters.nbdkit_process import private_directory
from qcow2_plugin.errors import Qcow2Error, printable

DEFAULT_TIMEOUT = 300.0
"""Seconds. Without KVM one launch takes a quarter of a minute of CPU, and as much again to inspect a guest."""
LINE_LIMIT = 32 << 20
"""Bytes of an answer's line of JSON."""
_PYTHONS = ("/usr/bin/python3", sys.executable)
_CHILD = Path(__file__).with_name("child.py")
_ONCE = 1 << 16
_SAID_LIMIT = 16384
_TOLD_LINES = 3
_GRACE_SECONDS = 3.0
_INSTALL = (
    "install libguestfs with 'apt install python3-guestfs linux-image-amd64' (Debian; Ubuntu: linux-image-generic) or "
    "'dnf install python3-libguestfs' (Fedora)"
)


class NoGuestfsError(Qcow2Error):
    """libguestfs is not installed, or cannot start here; the message says what to do."""


class GuestError(Qcow2Error):
    """libguestfs could not do what was asked with this guest, not in time, or not within bounds."""


class Answer(NamedTuple):
    """What the child answered."""

    told: Any
    payload: bytes


@dataclass(slots=True)
class _Known:
    """What this process has learned about the machine."""

    without_kvm: bool = False


_known = _Known()


def ask(
    verb: str,
    drives: Sequence[Drive],
    *,
    timeout: float = DEFAULT_TIMEOUT,
    payload_limit: int = 0,
    **request: Any,
) -> Answer:
    """The child's answer to `verb`, after one launch with all these drives, read-only, within `timeout` seconds.

    Raises NoGuestfsError; GuestError if it says that it could not, needs longer, or answers with more than
    `LINE_LIMIT` and `payload_limit` bytes; OSError.
    """
    words = {
        "verb": verb,
        "asked_by": os.getpid(),
        "drives": [{"kind": drive.kind, "path": drive.path} for drive in drives],
        "without_kvm": _known.without_kvm,
        "payload_limit": payload_limit,
        **request,
    }
    deadline = time.monotonic() + timeout
    for python in dict.fromkeys(_PYTHONS):
        if not os.access(python, os.X_OK):
            continue
        answer = _answer(python, json.dumps(words).encode(), deadline, timeout, payload_limit)
        if answer.told.get("no_guestfs"):
            continue
        _known.without_kvm = _known.without_kvm or bool(answer.told.get("without_kvm"))
        if "failure" in answer.told:
            raise _failure(answer.told)
        return answer
    raise NoGuestfsError(f"no Python here has the guestfs module; {_INSTALL}")


def _answer(python: str, request: bytes, deadline: float, timeout: float, payload_limit: int) -> Answer:
    with private_directory() as folder:
        # By env(1), since this layer does not read the environment: sockets and overlays go where they are removed.
        command = ["/usr/bin/env", f"XDG_RUNTIME_DIR={folder}", f"LIBGUESTFS_TMPDIR={folder}", "LC_ALL=C.UTF-8"]
        process = subprocess.Popen(
            [*command, python, "-I", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        with process:
            try:
                assert process.stdin is not None
                with suppress(BrokenPipeError):
                    process.stdin.write(request)
                    process.stdin.close()
                said = bytearray()
                line, payload = _collect(process, said, deadline, timeout, payload_limit)
                if not line:
                    raise GuestError(f"libguestfs' process ended without an answer{_tail(said)}")
                return Answer(_parsed(line), payload)
            finally:
                _end(process)


def _collect(
    process: subprocess.Popen[bytes], said: bytearray, deadline: float, timeout: float, payload_limit: int
) -> tuple[bytes, bytes]:
    """The line and the bytes after it that the child wrote until it closed its stdout. `said` gets its stderr's end."""
    assert process.stdout is not None
    assert process.stderr is not None
    written = bytearray()
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ, written)
        ready.register(process.stderr, selectors.EVENT_READ, said)
        while process.stdout in {key.fileobj for key in ready.get_map().values()}:
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestError(f"libguestfs needs longer than {timeout:g} seconds (option timeout){_tail(said)}")
            for key, _ in ready.select(left):
                more = key.fileobj.read(_ONCE)  # type: ignore[union-attr] # a file, as registered
                if not more:
                    ready.unregister(key.fileobj)
                key.data.extend(more)
            del said[:-_SAID_LIMIT]
            if len(written) > LINE_LIMIT + payload_limit:
                raise GuestError(f"libguestfs tells more than {LINE_LIMIT} bytes about this guest")
    line, _, payload = written.partition(b"\n")
    return bytes(line), bytes(payload)


def _parsed(line: bytes) -> Any:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise GuestError("libguestfs' process gave an answer that is none")
    return told


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the child and all that it started, QEMU too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _signalled(process, number):
            break
        deadline = time.monotonic() + _GRACE_SECONDS
        while _signalled(process, 0) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.01)
    process.wait()


def _signalled(process: subprocess.Popen[bytes], number: int) -> bool:
    """False if nobody is left in the child's process group."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _failure(told: Mapping[str, Any]) -> Qcow2Error:
    failure = printable(str(told["failure"]))
    if not told.get("at_launch"):
        return GuestError(failure)
    kernels = [*glob.glob("/boot/vmlinu[xz]-*"), *glob.glob("/lib/modules/*/vmlinuz")]
    if not kernels:
        return NoGuestfsError(f"libguestfs found no Linux kernel to start; {_INSTALL} ({failure})")
    if not any(os.access(kernel, os.R_OK) for kernel in kernels):
        return NoGuestfsError(
            f"libguestfs starts a copy of this machine's kernel, which only root may read here; allow it with 'sudo "
            f"chmod 0644 /boot/vmlinuz-*' ({failure})"
        )
    return NoGuestfsError(f"libguestfs cannot start here; 'libguestfs-test-tool' tells why ({failure})")


def _tail(said: bytearray) -> str:
    """What the child said last on stderr, safe to print."""
    lines = [line for line in said.splitlines() if line.strip()][-_TOLD_LINES:]
    return "".join(f"; {printable(bytes(line))}" for line in lines)
