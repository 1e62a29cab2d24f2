#!/usr/bin/env bash
# Brings a machine on which nothing was installed by hand to where images can be served and tests can run:
#
#   bash tests/support/setup.sh [test | bench]    with either, fio with its nbd engine and XFS as well;
#                                                 with "test", libguestfs and the Python packages that tests need too
#
# Owns the list of system packages, and .venv. What is there already is left alone, so that a second run takes a
# moment. examples/quickstart.sh and tests/run.sh start with it. It needs no terminal and no input; when it cannot go
# on it says why in one line on stderr and exits with 1.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
purpose=${1:-}
extra=${purpose/bench/} # what pip installs beside the package
venv=$root/.venv
python=/usr/bin/python3 # not the first on PATH: nbdkit embeds the distribution's
log=

# Where mke2fs and sfdisk are, which are no administrator's tools here.
PATH=$PATH:/usr/sbin:/sbin

# An environment made for another Python must not leak into this one.
unset PYTHONHOME PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_USER=0

main() {
    cd -- "$root"
    exec 9<"$root" # two runs in one checkout take turns
    if have flock && ! flock --nonblock 9; then
        say "Waiting for another set-up of this checkout"
        flock 9 || true # a file system without locks
    fi
    [[ ! -x $python ]] || refuse_old_python
    find_missing
    if ((${#missing[@]})); then
        install_packages
        refuse_old_python
        find_missing
        ((!${#missing[@]})) || die "still not usable after their installation: ${missing[*]} (log: $log)"
    fi
    [[ $purpose != test ]] || allow_reading_kernel
    made_for_this_machine || make_venv
    installed_as_it_should_be || install_python_packages
    [[ -z $log ]] || rm -f -- "$log"
}

# ---- words

say() { printf '%s\n' "$*"; }

die() {
    printf 'qcow2-plugin: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null; }

# Runs a command whose output matters only when it fails.
logged() {
    [[ -n $log ]] || log=$(mktemp "${TMPDIR:-/tmp}/qcow2-plugin-setup.XXXXXX.log")
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null 9<&-
}

# ---- system packages

# Sets `missing` to the names, in this distribution, of the packages whose purpose is not served yet.
find_missing() {
    missing=()
    want python3-venv python3 "$python" -I -c 'import ensurepip, venv'
    want nbdkit nbdkit nbdkit --filter=truncate null --dump-plugin # with its filters
    want nbdkit-plugin-python nbdkit-python-plugin nbdkit python --dump-plugin
    want libnbd-bin libnbd eval 'nbdinfo --version && nbdcopy --version'
    want python3-libnbd python3-libnbd "$python" -I -c 'import nbd'
    want qemu-utils qemu-img eval 'qemu-img --version && qemu-io --version && qemu-nbd --version'
    [[ -z $purpose ]] || want fio fio-engine-nbd fio --enghelp=nbd
    [[ -z $purpose ]] || want xfsprogs xfsprogs have mkfs.xfs # a file system that shares blocks
    [[ $purpose != test ]] || want strace strace have strace
    [[ $purpose != test ]] || want borgbackup borgbackup borg --version
    [[ $purpose != test ]] || want restic restic restic version
    [[ $purpose != test ]] || find_missing_for_guests
}

# libguestfs with what makes guests for it. It starts a copy of the kernel that it finds in /boot, which a container
# may not have. The first launch takes a little longer, because it prepares the appliance.
find_missing_for_guests() {
    want e2fsprogs e2fsprogs eval 'have mke2fs && have debugfs'
    want fdisk util-linux have sfdisk
    want python3-guestfs python3-libguestfs "$python" -I -c 'import guestfs'
    want guestfish /usr/bin/guestfish guestfish --version
    want "$(kernel_package)" kernel-core eval 'compgen -G "/boot/vmlinu[xz]-*" || compgen -G "/lib/modules/*/vmlinuz"'
}

kernel_package() {
    local ID=''
    # shellcheck source=/dev/null
    [[ ! -r /etc/os-release ]] || . /etc/os-release
    if [[ $ID == ubuntu ]]; then
        echo linux-image-virtual
    else
        echo "linux-image-$(dpkg --print-architecture 2>/dev/null || echo amd64)"
    fi
}

# Ubuntu lets only root read its kernels.
allow_reading_kernel() {
    local kernel
    for kernel in /boot/vmlinu[xz]-* /lib/modules/*/vmlinuz; do
        [[ ! -r $kernel ]] || return 0
    done
    if may_sudo; then logged sudo sh -c 'chmod 0644 /boot/vmlinu[xz]-*' || true; fi
}

# want DEBIAN_NAME FEDORA_NAME PROBE...
want() {
    local debian=$1 fedora=$2
    shift 2
    "$@" >/dev/null 2>&1 </dev/null || case $(distribution) in
        fedora) missing+=("$fedora") ;;
        *) missing+=("$debian") ;;
    esac
}

distribution() {
    local ID='' ID_LIKE=''
    # shellcheck source=/dev/null
    [[ ! -r /etc/os-release ]] || . /etc/os-release
    case " $ID $ID_LIKE " in
        *" debian "* | *" ubuntu "*) echo debian ;;
        *" fedora "* | *" rhel "*) echo fedora ;;
        *) echo unknown ;;
    esac
}

install_packages() {
    local install as_root=()
    case $(distribution) in
        debian) install=(apt-get install) ;;
        fedora) install=(dnf install) ;;
        *) die "not Debian, Ubuntu or Fedora; please install what they call ${missing[*]}, then run this again" ;;
    esac
    have "${install[0]}" || die "${install[0]} is not here to install ${missing[*]}"
    if ((EUID != 0)); then
        may_sudo || die "needs root once, no usable sudo here; please run as root: ${install[*]} ${missing[*]}"
        as_root=(sudo)
    fi
    say "Installing ${missing[*]} (a minute or two)"
    if [[ ${install[0]} == apt-get ]]; then
        as_root+=(env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1)
        # A broken third-party source fails the update but seldom the installation, which decides.
        logged "${as_root[@]}" apt-get update || true
        install+=(-y --no-install-recommends -o DPkg::Lock::Timeout=300)
    else
        install+=(-y --setopt=install_weak_deps=False)
    fi
    logged "${as_root[@]}" "${install[@]}" "${missing[@]}" ||
        die "could not install ${missing[*]}; is the network reachable? (log: $log)"
}

# Asks for a password only where somebody can type one.
may_sudo() {
    have sudo || return
    sudo -n true 2>/dev/null 9<&- || { [[ -t 0 && -t 2 ]] && sudo -v 9<&-; }
}

refuse_old_python() {
    local least
    least=$(sed -n 's/^requires-python = ">=\([0-9.]*\)"$/\1/p' pyproject.toml)
    "$python" -I -c "import sys; sys.exit(sys.version_info < (${least//./, }))" ||
        die "$python, the one that nbdkit embeds, is $("$python" -V 2>&1); $least or newer is needed"
}

# ---- .venv

# What a virtual environment depends on; when either changes it has to be made anew.
origin() { printf '%s\n' "$root" "$("$python" -V)"; }

made_for_this_machine() { cmp -s -- <(origin) "$venv/made-for"; }

make_venv() {
    if [[ -e $venv && ! -e $venv/made-for ]]; then
        die "$venv was not made by this script; please move it away, then run this again"
    fi
    say "Making .venv"
    { rm -rf -- "$venv" && mkdir -- "$venv"; } 2>/dev/null || die "$(id -un) may not write to $venv"
    : >"$venv/made-for" # ours, and not finished
    logged "$python" -m venv --system-site-packages "$venv" || die "could not make $venv (log: $log)"
    origin >"$venv/made-for"
}

# The stamps are copies of the pyproject.toml that was installed, without and with the extra.
installed_as_it_should_be() { cmp -s pyproject.toml "$venv/installed${extra:+-$extra}"; }

install_python_packages() {
    [[ -w $venv ]] || die "$(id -un) may not write to $venv"
    say "Installing Python packages into .venv"
    rm -f -- "$venv"/installed*
    logged "$venv/bin/python" -m pip install --editable ".${extra:+[$extra]}" ||
        die "pip could not install the Python packages; is the network reachable? (log: $log)"
    cp -- pyproject.toml "$venv/installed"
    [[ -z $extra ]] || cp -- pyproject.toml "$venv/installed-$extra"
}

main
