#!/usr/bin/env bash
# Measures side by side with QEMU's tools, on a machine where nothing was installed by hand too:
#
#   bash tests/bench/run.sh                                        everything; some 25 minutes on a quiet machine
#   bash tests/bench/run.sh --only "fio plain" --rounds 3          a part of it; --help tells every option
#
# Tables go to standard output, progress to standard error, every single round to bench.json (--json FILE). File names
# are relative to the project's folder. The images live in /dev/shm, about 4 GiB of it, and go with the run.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
[[ -e /dev/fd/0 ]] || exec </dev/null # some runners start jobs with no stdin at all

bash tests/support/setup.sh bench >&2
unset PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE # compiled modules are kept, as in any installation

exec .venv/bin/python -m tests.bench "$@"
