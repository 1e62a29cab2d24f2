#!/usr/sbin/nbdkit python
"""nbdkit plugin that serves a qcow2 image: `nbdkit -f -i 127.0.0.1 python ./nbdkit_plugin.py file=disk.qcow2`.

The image is writable unless nbdkit is given -r or a parameter says readonly=true.

nbdkit's callbacks and nothing else; each is one line into `qcow2_plugin.adapters.nbd`, which says what is served.
nbdkit finds callbacks by their global names, so only modules are imported here, never names. It runs this file in the
distribution's interpreter with nothing of ours on the path, so the package is looked for beside this file: in the same
directory, and in the `.venv` there.
"""

import atexit
import glob
import io
import os
import site
import sys

API_VERSION = 2

_here = os.path.dirname(os.path.abspath(sys._getframe().f_code.co_filename))
_version = f"{sys.version_info.major}.{sys.version_info.minor}"
sys.path.insert(0, _here)
for _packages in glob.glob(os.path.join(glob.escape(_here), ".venv", "lib*", f"python{_version}", "site-packages")):
    site.addsitedir(_packages)

# numpy's library for linear algebra, of which nothing is used here, would start threads before nbdkit forks.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

try:
    from qcow2_plugin.adapters import command_line, nbd
except ImportError as _error:
    sys.exit(
        f"nbdkit_plugin.py: {_error} (Python {_version}, which is nbdkit's own). The package must be installed for "
        f"this Python: run 'bash examples/quickstart.sh' beside this file, or make a .venv in {_here} with the "
        f"distribution's python3 and 'pip install qcow2-plugin' into it."
    )

if "nbdkit" not in sys.builtin_module_names:
    if {"--help", "-h"} & set(sys.argv):
        print(command_line.help_text())
        sys.exit(0)
    print(command_line.help_text(), file=sys.stderr)
    sys.exit(2)

import nbdkit  # it exists only inside nbdkit

with io.FileIO("/proc/self/cmdline") as _file:  # sys.argv is empty in nbdkit
    _words = os.fsdecode(_file.readall()).split("\0")[1:]
_server = nbd.Server(nbdkit.set_error, nbdkit.parse_size, read_only=command_line.asks_for_read_only(_words))


def dump_plugin() -> None:
    print(command_line.dump_parameters())


def config(key: str, value: str) -> None:
    _server.configure(key, value)


def config_complete() -> None:
    _server.open()


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def cleanup() -> None:
    atexit.register(os._exit, 1)  # if this fails: nbdkit itself would end with 0
    _server.close()
    atexit.unregister(os._exit)


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return _server.exports()


def open(readonly: bool) -> nbd.Connection:
    return _server.connect(nbdkit.export_name())


def close(h: nbd.Connection) -> None:
    h.close()


def export_description(h: nbd.Connection) -> str:
    return h.description()


def get_size(h: nbd.Connection) -> int:
    return h.virtual_size


def block_size(h: nbd.Connection) -> tuple[int, int, int]:
    return h.block_sizes


def can_multi_conn(h: nbd.Connection) -> bool:
    return True


def can_write(h: nbd.Connection) -> bool:
    return h.writable


def can_flush(h: nbd.Connection) -> bool:
    return h.writable


def can_trim(h: nbd.Connection) -> bool:
    return h.writable


def can_zero(h: nbd.Connection) -> bool:
    return h.writable


def can_fast_zero(h: nbd.Connection) -> bool:
    return h.writable


def can_fua(h: nbd.Connection) -> int:
    return int(nbdkit.FUA_NATIVE if h.writable else nbdkit.FUA_NONE)


def can_cache(h: nbd.Connection) -> int:
    return int(nbdkit.CACHE_NATIVE)


def pread(h: nbd.Connection, buf: memoryview, offset: int, flags: int) -> None:
    h.read_into(buf, offset)


def pwrite(h: nbd.WritableConnection, buf: memoryview, offset: int, flags: int) -> None:
    h.write_from(buf, offset, bool(flags & nbdkit.FLAG_FUA))


def flush(h: nbd.WritableConnection, flags: int) -> None:
    h.flush()


def trim(h: nbd.WritableConnection, count: int, offset: int, flags: int) -> None:
    h.discard(offset, count, durable=bool(flags & nbdkit.FLAG_FUA))


def zero(h: nbd.WritableConnection, count: int, offset: int, flags: int) -> None:
    h.write_zeroes(
        offset,
        count,
        may_unmap=bool(flags & nbdkit.FLAG_MAY_TRIM),
        only_fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
        durable=bool(flags & nbdkit.FLAG_FUA),
    )


def extents(h: nbd.Connection, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    return h.states(offset, count, only_first=bool(flags & nbdkit.FLAG_REQ_ONE))


def cache(h: nbd.Connection, count: int, offset: int, flags: int) -> None:
    h.prefetch(offset, count)
