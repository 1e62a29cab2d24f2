"""The plugin as it is, which tells what its threads leave behind instead of listing exports.

nbdkit loads this file in place of nbdkit_plugin.py. It owns the two numbers: Python's thread states, those in use
among them, and the states that wait for their thread to end.
"""

import os
import sys

_plugin = os.path.join(os.path.dirname(os.path.abspath(sys._getframe().f_code.co_filename)), "../../nbdkit_plugin.py")
with open(_plugin) as _file:
    exec(compile(_file.read(), os.path.normpath(_plugin), "exec"))


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    from qcow2_plugin.adapters import thread_states
    from tests.support import foreign_threads

    left_behind = len(thread_states._left_behind)
    return [("states", str(foreign_threads.count_thread_states())), ("left behind", str(left_behind))]
