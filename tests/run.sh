#!/usr/bin/env bash
# Runs the tests, on a machine where nothing was installed by hand too:
#
#   bash tests/run.sh                   set-up, then lint, layout, types and all tests
#   bash tests/run.sh -k name           set-up, then only pytest, with these arguments
#
# A second run does no set-up. Works from any directory. The status is 0 only when everything passed.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
[[ -e /dev/fd/0 ]] || exec </dev/null # some runners start jobs with no stdin at all

bash tests/support/setup.sh test
python=.venv/bin/python
unset PYTHONHOME PYTHONPATH

if (($#)); then
    exec "$python" -m pytest "$@"
fi

failed=()
step() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}

step lint "$python" -m ruff check .
step layout "$python" -m ruff format --check .
step types "$python" -m mypy

aside=(tests/crash tests/interop/test_guestfs.py tests/interop/test_examples.py
    tests/interop/test_backup*.py tests/interop/test_targets.py)
printf '\n== tests (those of crashes, guests and backups beside all others, and told of in the end)\n'
log=$(mktemp)
"$python" -m pytest "${aside[@]}" >"$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null; rm -f "$log"' EXIT
"$python" -m pytest "${aside[@]/#/--ignore=}" || failed+=(tests)
wait "$beside" || failed+=('tests of crashes, guests and backups')
trap 'rm -f "$log"' EXIT # nothing is left to end, and a vain kill would be the status
cat "$log"

if ((${#failed[@]})); then
    printf '\nfailed: %s\n' "${failed[*]}" >&2
    exit 1
fi
