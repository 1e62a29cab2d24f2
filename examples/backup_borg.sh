#!/usr/bin/env bash
# Keeps backups of a disk in a Borg repository, and restores one with Borg and qemu-img alone:
#
#   bash examples/backup_borg.sh [FOLDER]
#
# Makes a small disk and an encrypted repository, two points of the disk, the second with what changed since the first,
# and restores both. FOLDER keeps the files; without it they are removed in the end. Needs borg (the package is called
# borgbackup).
set -euo pipefail

command -v borg >/dev/null || {
    echo "borg is not installed; its package is called borgbackup" >&2
    exit 1
}
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/tests/support/setup.sh"
qcow2=$root/.venv/bin/qcow2
if (($#)); then
    cd -- "$1"
else
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/qcow2-plugin.XXXXXX")
    trap 'rm -rf -- "$work"' EXIT
    cd -- "$work"
fi

heading() { printf '\n== %s\n' "$*"; }

heading "A disk, and an encrypted repository whose passphrase is in a file"
"$qcow2" create disk.qcow2 64M
qemu-io -c 'write -q -P 0x61 0 8M' -c 'write -q -P 0x62 32M 1M' disk.qcow2
(umask 077 && head -c 24 /dev/urandom | base64 >passphrase)
BORG_PASSPHRASE=$(<passphrase) borg init --encryption=repokey repository
target=(borg:"$PWD/repository" --target-option passphrase=file:"$PWD/passphrase")

heading "The first point: a full member"
"$qcow2" backup disk.qcow2 --to "${target[@]}"
qemu-img convert -O raw disk.qcow2 first.raw

heading "The guest goes on; the second point holds what changed"
qemu-io -c 'write -q -P 0x63 40M 200k' -c 'write -q -z 0 64k' disk.qcow2
"$qcow2" backup disk.qcow2 --to "${target[@]}"
"$qcow2" points "${target[@]}"

heading "Restored by qcow2"
"$qcow2" restore --from "${target[@]}" --verify restored.qcow2
qemu-img compare disk.qcow2 restored.qcow2

heading "Restored with borg and qemu-img alone"
export BORG_PASSPHRASE
BORG_PASSPHRASE=$(<passphrase)
for archive in $(borg list --short repository); do
    borg extract --stdout "repository::$archive" >"${archive#qcow2.}"
done
members=(*z-*.disk.qcow2) # by time
qemu-img compare -f qcow2 -F qcow2 disk.qcow2 "${members[-1]}"
qemu-img compare -f raw -F qcow2 first.raw "${members[0]}"
