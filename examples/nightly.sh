#!/usr/bin/env bash
# A nightly job: backs up the disks of one guest together, looks whether the result can be restored, and gives up what
# is older than need be.
#
#   bash examples/nightly.sh TARGET DISK=IMAGE...
#
# As root=/images/vm-root.qcow2 data=/images/vm-data.qcow2 logs=/images/vm-logs.qcow2: all as of one moment. The images
# must not be in use. For cron or a systemd timer; says nothing on stdout when all is well, so that mail means trouble.
# The status is 0 when the night's point is made, and all that is kept can be restored.
#
# QCOW2 is the command to call, KEEP the rules of what stays.
set -euo pipefail

if (($# < 2)); then
    sed -n 's/^# \{0,1\}//; 2,12p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
qcow2=${QCOW2:-qcow2}
read -ra keep <<<"${KEEP:---keep-daily 7 --keep-weekly 4 --keep-monthly 6}"
target=$1
shift

# Two jobs of the same disks would only be in each other's way: the second one leaves.
exec 9<"${1#*=}"
flock --nonblock 9 || {
    echo "nightly: the backup of last time still runs" >&2
    exit 75
}

# What an interrupted night left is brought to its end or taken back first, by itself. Status 3: the point is made, and
# an image keeps one bitmap too many until the next time.
status=0
"$qcow2" backup "$@" --to "$target" --quiet --label "job=nightly" || status=$?
if ((status != 0 && status != 3)); then
    echo "nightly: no point was made (status $status); the last one is as good as it was" >&2
    exit "$status"
fi

# The night's point is rebuilt and compared; of the others, what is stored is looked at.
"$qcow2" verify "$target" --point latest --level 2 --quiet
"$qcow2" verify "$target" --level 0 --quiet

# Only after that something is given up.
"$qcow2" prune "$target" "${keep[@]}" --quiet
