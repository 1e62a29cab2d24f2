"""What libguestfs needs for an image: a raw disk to read, as a file or as an NBD export, and the words that name it.

libguestfs never sees a qcow2 file, and never guesses a format: whatever the guest wrote into its first sector, the
drive is "raw". The raw data file itself is the drive where it is the disk (`raw_view`), to its last byte, and is only
read: that costs nothing, and keeps the locks on it until the block ends. libguestfs opens it again, by its name:
whoever may rename files in its directory can put another one in its place before that.

All else goes through nbdkit on a private Unix socket, writing in particular: so bitmaps mark what libguestfs writes,
and zero clusters that it writes to become data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import quote

from qcow2_plugin.adapters.nbdkit_process import is_utf8, plugin_parameters, serving
from qcow2_plugin.errors import NoRawViewError, OptionError
from qcow2_plugin.operations.raw_view import RawView, raw_view
from qcow2_plugin.storage.opener import Policy

if TYPE_CHECKING:
    from qcow2_plugin.engine.files import References

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk for libguestfs: an absolute path, of a raw file (`kind` "raw") or of nbdkit's Unix socket ("nbd")."""

    image: str
    kind: Literal["raw", "nbd"]
    path: str
    writable: bool = False
    format: ClassVar[str] = "raw"

    def add_to(self, handle: Any) -> None:
        """Add it to a handle of the guestfs module (`guestfs.GuestFS`) that is not launched yet."""
        options: dict[str, Any] = {"format": self.format, "readonly": not self.writable}
        if self.kind == "nbd":
            handle.add_drive_opts("", protocol="nbd", server=[f"unix:{self.path}"], **options)
        else:
            handle.add_drive_opts(self.path, **options)

    def arguments(self) -> list[str]:
        """The words that name it for guestfish and the virt-* commands."""
        return [f"--format={self.format}", "-a", self.path if self.kind == "raw" else socket_uri(self.path)]

    def guestfish_arguments(self) -> list[str]:
        """The same for guestfish, guestmount and virt-rescue, which would write unless told not to."""
        return ["--rw" if self.writable else "--ro", *self.arguments()]


@contextmanager
def guestfs_drive(
    image: Path,
    *,
    writable: bool = False,
    snapshot: str | None = None,
    policy: Policy = Policy.CONFINED,
    data_file: Path | None = None,
    backing_file: Path | None = None,
    backing_format: str | None = None,
    base_directory: Path | None = None,
    allow_damaged: bool = False,
    force_share: bool = False,
    references: References | None = None,
) -> Iterator[Drive]:
    """A drive for libguestfs that shows the disk of `image`, until the block ends; libguestfs must be done by then.

    The options are those of `open_image`; nbdkit is told where the `references` found files. Unless it is `writable`
    nothing can be written to the image. If it is, what was written is stored when the block ends.

    Raises OptionError if it is to be written and what is asked for is for reading only; CannotServeError with the
    words of nbdkit: it is missing, the image cannot be opened, what was written could not be stored; OSError.

    Lock: while the block runs the image (and its data file) is locked for reading, or for writing if `writable`.
    """
    only_read = {"snapshot": snapshot, "allow_damaged": allow_damaged, "force_share": force_share}
    refused = [name for name, value in only_read.items() if value]
    if writable and refused:
        raise OptionError(f"{refused[0].replace('_', '-')} is for reading only, a writable drive cannot have it")
    with ExitStack() as resources:
        if not writable and snapshot is None:
            view = _raw_disk(
                resources,
                image,
                policy=policy,
                data_file=data_file,
                base_directory=base_directory,
                force_share=force_share,
                references=references,
            )
            if view is not None:
                yield Drive(os.fspath(image), "raw", view.path)
                return
        options: dict[str, Any] = {
            "data_file": data_file,
            "backing_file": backing_file,
            "backing_format": backing_format,
            "base_directory": base_directory,
            **only_read,
        }
        if references is not None:
            options |= _found(image, references, policy=policy, **options)
        parameters = plugin_parameters(image, writable=writable, policy=policy.value, **options)
        socket = resources.enter_context(serving(parameters, writable=writable))
        yield Drive(os.fspath(image), "nbd", str(socket), writable)


def _found(image: Path, references: References, **opening: Any) -> dict[str, str]:
    """Where the data file and the backing file of the image are, for a child that cannot ask the references."""
    from qcow2_plugin.engine.chain import open_image
    from qcow2_plugin.engine.image import Image
    from qcow2_plugin.engine.raw import RawDisk

    with open_image(image, references=references, **opening) as opened:
        layer = opened.layer
        files: dict[str, str | None] = {"data_file": layer.data.path if layer.data is not layer.storage else None}
        if isinstance(layer.backing, Image):
            files["backing_file"] = layer.backing.layer.storage.path
        elif isinstance(layer.backing, RawDisk):
            files["backing_file"] = layer.backing.storage.path
        return {option: path for option, path in files.items() if path is not None}


def _raw_disk(resources: ExitStack, image: Path, **opening: Any) -> RawView | None:
    """The raw data file, held by `resources`, if it is the disk and no byte more, for libguestfs takes whole files, and
    if its name is UTF-8, for the guestfs module takes no other.
    """
    with ExitStack() as attempt:
        try:
            view = attempt.enter_context(raw_view(image, **opening))
        except NoRawViewError:
            return None
        if view.file_size != view.virtual_size or not is_utf8(view.path):
            return None
        resources.push(attempt.pop_all())
        return view


def socket_uri(path: str) -> str:
    """The URI by which libguestfs' commands know an NBD server on a Unix socket; they do not know "nbd+unix:"."""
    return f"nbd://?socket={quote(os.fsencode(path))}"
