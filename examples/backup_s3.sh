#!/usr/bin/env bash
# Keeps backups of a disk in an S3 store, and restores one:
#
#   bash examples/backup_s3.sh s3://BUCKET/PREFIX [ENDPOINT [FOLDER]]
#
# Makes a small disk, two points of it, the second with what changed since the first, and restores the disk from the
# store. The bucket must be there; what is kept stays there. ENDPOINT is the URL of a store that is not Amazon's. The
# credentials are those that Amazon's tools would use: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for example. FOLDER
# keeps the files; without it they are removed in the end.
set -euo pipefail

if (($# < 1 || $# > 3)); then
    sed -n 's/^# \{0,1\}//; 2,9p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/tests/support/setup.sh"
qcow2=$root/.venv/bin/qcow2
"$root/.venv/bin/python" -c 'import obstore' 2>/dev/null ||
    "$root/.venv/bin/python" -m pip install --quiet "$root[s3]" # what S3 needs is an extra
target=("$1" --target-option "region=${AWS_REGION:-us-east-1}")
[[ -z ${2:-} ]] || target+=(--target-option "endpoint=$2")
if (($# == 3)); then
    cd -- "$3"
else
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/qcow2-plugin.XXXXXX")
    trap 'rm -rf -- "$work"' EXIT
    cd -- "$work"
fi

heading() { printf '\n== %s\n' "$*"; }

heading "A disk, and its first point: a full member, compressed"
"$qcow2" create disk.qcow2 64M
qemu-io -c 'write -q -P 0x61 0 8M' -c 'write -q -P 0x62 32M 1M' disk.qcow2
"$qcow2" backup disk.qcow2 --compress --to "${target[@]}"

heading "The guest goes on; the second point holds what changed"
qemu-io -c 'write -q -P 0x63 40M 200k' -c 'write -q -z 0 64k' disk.qcow2
"$qcow2" backup disk.qcow2 --to "${target[@]}"
"$qcow2" points "${target[@]}"

heading "Whether all of it can be restored, and then the disk itself"
"$qcow2" verify --level 2 "${target[@]}"
"$qcow2" restore --from "${target[@]}" --verify restored.qcow2
qemu-img compare disk.qcow2 restored.qcow2
