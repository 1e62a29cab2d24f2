#!/usr/bin/env python3
"""Which systems are on these images, and what do they call themselves?

    .venv/bin/python examples/inspect_guest.py IMAGE...

One launch of libguestfs for all of them, read-only; then a second one that reads a file out of the first guest. The
Python that runs this needs no guestfs module: the distribution's is asked, in a process of its own.
"""

import sys

from qcow2_plugin.adapters.guestfs import inspect, read_guest_file
from qcow2_plugin.errors import Qcow2Error, printable


def main(images: list[str]) -> None:
    """Print what is found; what a guest says may hold anything, so it is made printable first."""
    guests = inspect(images)
    for guest in guests:
        print(f"{printable(guest.image)}: {len(guest.partitions)} partitions, read as {guest.kind}")
        for system in guest.operating_systems:
            words = (system.distribution, system.major, system.host_name, system.architecture)
            print(f"  {printable(system.device)}:", *(printable(str(word)) for word in words if word is not None))
        for each in guest.file_systems:
            if each.free is not None:
                print(f"  {printable(each.device)}: {printable(each.type)}, {each.free >> 20} MiB free")
    for system in guests[0].operating_systems[:1]:
        # Without `device` the guest is looked for again, which takes longer.
        content = read_guest_file(images[0], "/etc/os-release", device=system.device, limit=1 << 20)
        for line in content.splitlines():
            print(f"  | {printable(line)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: inspect_guest.py IMAGE...")
    try:
        main(sys.argv[1:])
    except (Qcow2Error, OSError) as error:
        sys.exit(f"inspect_guest.py: {error}")
