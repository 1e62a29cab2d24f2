#!/usr/bin/env bash
# Makes of any image one whose disk is a plain raw file, which guestfish and the virt-* commands read without a server:
#
#   bash examples/export_for_guestfish.sh IMAGE FOLDER
#
# FOLDER gets two files: NAME.raw, the disk, and NAME.qcow2, which keeps the books for it. IMAGE is only read.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
if (($# != 2)); then
    printf 'usage: bash examples/export_for_guestfish.sh IMAGE FOLDER\n' >&2
    exit 2
fi
image=$1 folder=$(realpath -- "$2")
bash "$root/tests/support/setup.sh"
qcow2=$root/.venv/bin/qcow2

name=$(basename -- "$image")
target=$folder/${name%.qcow2}.qcow2
"$qcow2" export --as=external-data-file --verify -- "$image" "$target"

printf '\nTo look into it, for example:\n'
"$qcow2" guestfs "$target"
