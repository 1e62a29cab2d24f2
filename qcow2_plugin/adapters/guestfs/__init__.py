"""libguestfs on any image: drives for it (`drive`), and what it finds in a guest (`inspection`).

with guestfs_drive("disk.qcow2") as drive:       # with the guestfs module of one's own
    g = guestfs.GuestFS(python_return_dict=True)
    drive.add_to(g)
    g.launch()
    ...
    g.close()                                    # before the block ends

for guest in inspect(["disk.qcow2"]):            # without: a child process has it
    print(guest.operating_systems)
"""

from qcow2_plugin.adapters.guestfs.appliance import GuestError, NoGuestfsError
from qcow2_plugin.adapters.guestfs.drive import Drive, guestfs_drive
from qcow2_plugin.adapters.guestfs.inspection import (
    Application,
    FileSystem,
    Guest,
    OperatingSystem,
    Partition,
    inspect,
    read_guest_file,
)

__all__ = [
    "Application",
    "Drive",
    "FileSystem",
    "Guest",
    "GuestError",
    "NoGuestfsError",
    "OperatingSystem",
    "Partition",
    "guestfs_drive",
    "inspect",
    "read_guest_file",
]
