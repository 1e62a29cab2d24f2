"""`python -m qcow2_plugin` is the `qcow2` command."""

import sys

from qcow2_plugin.adapters.cli import main

sys.exit(main())
