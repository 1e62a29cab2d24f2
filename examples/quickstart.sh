#!/usr/bin/env bash
# From a fresh machine to a qcow2 image served over NBD, in one command:
#
#   bash examples/quickstart.sh [IMAGE]
#
# Installs what is missing, serves IMAGE through nbdkit, shows what a client sees, copies the disk out, compares the
# copy with what qemu-img reads, looks into the guest where libguestfs is installed, and prints what to type next.
# Without IMAGE it makes a small one, whose data is in a second file. IMAGE is only read, never changed. Of a disk beyond
# 4 GiB only the first GiB is copied, and never more than half of the free space below TMPDIR (/var/tmp when unset) is
# used; all of it is given back.
set -euo pipefail

readonly WHOLE_UP_TO=$((4 << 30)) PART=$((1 << 30)) MAP_LINES=16

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
plugin=$root/nbdkit_plugin.py
given=
image=demo.qcow2
work=

main() {
    [[ -e /dev/fd/0 ]] || exec </dev/null
    take_arguments "$@"
    bash "$root/tests/support/setup.sh"
    make_work_directory
    [[ -n $given ]] || make_demo_image

    heading "What an NBD client sees"
    serve "nbdinfo --no-content \"\$uri\""

    heading "Its map"
    serve "nbdinfo --map \"\$uri\"" | first_lines

    copy_and_compare
    look_inside
    print_next
}

take_arguments() {
    if (($# > 1)) || [[ ${1:-} == -* ]]; then
        printf 'usage: bash examples/quickstart.sh [IMAGE]\n' >&2
        exit 2
    fi
    (($#)) || return 0
    given=$1
    [[ -f $given || -b $given ]] || die "$(quoted "$given") is neither a file nor a block device"
    [[ -r $given ]] || die "$(quoted "$given") may not be read by $(id -un)"
    image=$(realpath -s -- "$given") # as given: relative backing files are looked up beside the link
}

make_work_directory() {
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/qcow2-plugin.XXXXXX") || die "cannot write to ${TMPDIR:-/var/tmp}"
    trap 'rm -rf -- "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    cd -- "$work"
}

make_demo_image() {
    heading "A small image that keeps its data in a second file"
    run qemu-img create -q -f qcow2 -o data_file=demo.data demo.qcow2 64M
    run qemu-io -f qcow2 -c 'write -q -P 0xd1 0 3M' -c 'write -q -z 1M 512k' -c 'write -q -P 0x9e 40M 64k' demo.qcow2
    ls -sh1 -- demo.qcow2 demo.data
}

copy_and_compare() {
    local size part note='' original
    size=$(nbdkit -r -U - python "$plugin" "file=$image" --run "nbdinfo --size \"\$uri\"") || could_not_serve
    part=$(portion_of "$size")
    original=(-f raw -F qcow2 copy.raw "$image")
    if ((part < size)); then
        note=", the first $(human "$part") of $(human "$size")"
        original=(--image-opts "driver=raw,file.driver=file,file.filename=copy.raw" "$(first_bytes "$part")")
    fi

    heading "Copied out$note"
    if ((part < size)); then
        serve "nbdcopy \"\$uri\" copy.raw" --filter=truncate "truncate=$part"
    else
        serve "nbdcopy \"\$uri\" copy.raw"
    fi
    (($(stat -c %s copy.raw) == part)) || die "the copy is $(stat -c %s copy.raw) bytes, not $part"

    heading "Compared with what qemu-img reads$note"
    run qemu-img compare "${original[@]}" || die "qemu-img does not find the same bytes"
}

# What libguestfs finds in the guest. An image without one is no failure, nor is a machine without libguestfs.
look_inside() {
    heading "The guest, as libguestfs sees it"
    if ! /usr/bin/python3 -I -c 'import guestfs' 2>/dev/null; then
        echo "skipped: libguestfs is not installed (apt install python3-guestfs, dnf install python3-libguestfs)"
    elif [[ -z $given ]]; then
        echo "skipped: there is no guest in the small image"
    else
        run "$root/.venv/bin/qcow2" inspect "$image" || echo "skipped: the reason is above"
    fi
}

# portion_of SIZE: how many bytes of the disk to copy.
portion_of() {
    local part=$1 spare
    spare=$(($(df -Pk . | awk 'NR == 2 { print $4 }') * 1024 / 2))
    if ((part > WHOLE_UP_TO)); then part=$PART; fi
    if ((part > spare)); then part=$((spare >> 20 << 20)); fi
    if ((part == 0 && $1 > 0)); then die "no room for a copy below ${TMPDIR:-/var/tmp}; set TMPDIR to another place"; fi
    echo "$part"
}

# first_bytes LENGTH: the beginning of the image, in the words of qemu-img's --image-opts.
first_bytes() {
    local protocol=file
    [[ ! -b $image ]] || protocol=host_device
    echo "driver=raw,size=$1,file.driver=qcow2,file.file.driver=$protocol,file.file.filename=${image//,/,,}"
}

# serve CLIENT [NBDKIT_OPTION [PARAMETER]]: nbdkit, read-only, for as long as the client, a shell command, runs.
serve() {
    run nbdkit -r -U - ${2:+"$2"} python "$plugin" "file=$image" ${3:+"$3"} --run "$1" || could_not_serve
}

could_not_serve() { die "could not serve $(quoted "$image"); the reason is above"; }

print_next() {
    local socket=${XDG_RUNTIME_DIR:-/tmp}/qcow2.sock uri
    uri="nbd+unix:///?socket=$socket"
    heading "Next"
    if [[ -z $given ]]; then
        echo "With an image of your own:"
        printf '  %s\n' "$(quoted bash "$root/examples/quickstart.sh") DISK.qcow2"
        image=DISK.qcow2
    fi
    echo "Serve it until Ctrl-C (without -r clients may write to it):"
    printf '  %s\n' "$(quoted nbdkit -r -f -U "$socket" python "$plugin" "file=$image")"
    echo "Read it from another terminal:"
    printf '  %s\n' "$(quoted nbdcopy "$uri" disk.raw)"
}

# ---- words

heading() { printf '\n== %s\n' "$*"; }

die() {
    printf 'qcow2-plugin: %s\n' "$*" >&2
    exit 1
}

human() { numfmt --to=iec-i --suffix=B "$1"; }

# Shows a command as it can be typed, then runs it.
run() {
    printf '$ %s\n' "$(quoted "$@")"
    "$@"
}

quoted() {
    local word words=()
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
        words+=("$word")
    done
    echo "${words[*]}"
}

first_lines() { awk -v most="$MAP_LINES" 'NR <= most; END { if (NR > most) print "... and " NR - most " more lines" }'; }

main "$@"
