"""A tiny Linux guest made from nothing: a partition table and an ext4 file system that libguestfs takes for a Debian.

Owns what is in it. Needs sfdisk and mke2fs, no root and no loop device. It boots nothing, and nobody runs its programs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.support.tools import run

MIB = 1 << 20
SIZE = 40 * MIB
"""Bytes of the disk."""
ROOT_OFFSET, ROOT_LENGTH = MIB, 32 * MIB
SECOND_LENGTH = 4 * MIB
ARCHITECTURE = "x86_64"
_ELF = "7f454c46020101000000000000000000 03003e0001000000"
"""The beginning of a 64-bit ELF file for x86-64: what file(1) tells the architecture by."""
_STATUS = """\
Package: demo
Status: install ok installed
Version: 1.2-3
Architecture: amd64
Maintainer: Nobody <nobody@example.org>
Description: shows that packages are found

"""


@dataclass(frozen=True)
class TinyGuest:
    """What the guest says of itself."""

    host_name: str = "tiny-guest"
    version: str = "12.5"
    label: str = "root"
    has_second: bool = True
    """With a second partition, which takes libguestfs two seconds more where there is no KVM."""
    files: dict[str, bytes] = field(default_factory=dict)

    def write_tree(self, folder: Path) -> Path:
        """Its root file system as files below `folder`."""
        for name in ("bin", "etc", "home", "proc", "sys", "tmp", "usr/lib", "var/lib/dpkg"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        known = {
            "bin/ls": bytes.fromhex(_ELF).ljust(64, b"\0"),
            "etc/debian_version": f"{self.version}\n".encode(),
            "etc/fstab": f"LABEL={self.label} / ext4 defaults 0 1\n".encode(),
            "etc/hostname": f"{self.host_name}\n".encode(),
            "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
            "usr/lib/os-release": (
                f'PRETTY_NAME="Debian GNU/Linux {self.version}"\nNAME="Debian GNU/Linux"\nID=debian\n'
                f'VERSION_ID="{self.version.partition(".")[0]}"\n'
            ).encode(),
            "var/lib/dpkg/status": _STATUS.encode(),
            **self.files,
        }
        for name, content in known.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "etc/os-release").symlink_to("../usr/lib/os-release")
        return folder

    def build(self, path: Path, scratch: Path) -> Path:
        """A raw disk at `path`: GPT, the root file system, and perhaps a second partition that is empty.

        `scratch` is a folder for its files, made here.
        """
        self.write_tree(scratch)
        with open(path, "wb") as disk:
            disk.truncate(SIZE)
        table = f"label: gpt\nstart=1MiB, size={ROOT_LENGTH // MIB}MiB, type=linux\n"
        table += f"size={SECOND_LENGTH // MIB}MiB, type=linux\n" if self.has_second else ""
        run("sh", "-c", 'printf %s "$1" | sfdisk -q "$2"', "sh", table, path)
        options = ("-L", self.label, "-d", scratch, "-E", f"offset={ROOT_OFFSET}")
        run("mke2fs", "-q", "-F", "-t", "ext4", *options, path, f"{ROOT_LENGTH // 1024}k")
        return path
