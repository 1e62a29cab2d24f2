#!/usr/bin/env bash
# Keeps incremental books for a raw disk that stays a raw disk:
#
#   bash examples/adopt_volume.sh [FOLDER]
#
# Makes a small raw disk (a file here; an LVM volume is no different), adopts it without touching a byte of it, writes
# to it through nbdkit, and backs up what changed by copying these blocks from the raw disk with dd. FOLDER keeps the
# files; without it they are removed in the end.
set -euo pipefail

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

heading "A raw disk that exists, and a full backup of it"
truncate -s 64M volume.raw
qemu-io -f raw -c 'write -q -P 0x61 0 3M' -c 'write -q -P 0x62 20M 1M' volume.raw
cp --sparse=always volume.raw backup.raw
before=$(sha256sum volume.raw)

heading "Adopted: the image keeps the books, the volume stays as it is"
"$qcow2" adopt --bitmap=monday volume.raw volume.qcow2
[[ $(sha256sum volume.raw) == "$before" ]]
echo "not one byte of the volume has changed"

heading "The guest writes, here through nbdkit"
"$qcow2" serve --writable volume.qcow2 --run \
    'qemu-io -f raw -c "write -q -P 0x63 5M 200k" -c "write -q -z 2M 64k" "$uri"'

heading "What changed since monday; from now on tuesday records"
"$qcow2" bitmap rotate --old monday --new tuesday volume.qcow2
"$qcow2" serve --bitmap=monday --run 'nbdinfo --map "$uri"' volume.qcow2 | tee changed

heading "The backup brought up to date with these blocks alone"
while read -r offset length kind _; do
    [[ $kind == 0 ]] || continue # 0 is data, here: dirty
    dd if=volume.raw of=backup.raw bs=64k iflag=skip_bytes,count_bytes oflag=seek_bytes conv=notrunc status=none \
        skip="$offset" seek="$offset" count="$length"
done <changed
cmp volume.raw backup.raw
echo "the backup equals the volume"
"$qcow2" check -q volume.qcow2
