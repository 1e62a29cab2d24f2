"""Changes of the bitmaps of several images, which happen on all of them or on none, whatever crashes in between.

A virtual machine with three disks is backed up as of one point in time: on all three, the bitmap that recorded since
the last backup is frozen and the next one starts. If a crash left that done on two of them, one disk of the next
incremental backup would be of another time than the others, or would have to be a full one. One image changes by one
write of its header, which no crash can tear; for several there is a *record*, a small file, that decides for all.

    1  all images stand still, in the order of their identities; nobody writes until the end, and all locks are held
    2  each gets its new bitmaps (directory, tables, bits), durably, which no header names       `prepare_bitmaps`
    3  the record is created, durably: "prepared", and which images take part
    4  each header is marked, durably: id of the transaction, where the new bitmaps are, name of the record
    5  the record is replaced, durably: "committed". This is the moment at which the change happens, on all of them
    6  each header is switched to the new bitmaps and loses its mark, in one change, durably
    7  the record is removed

So the record exists as long as any image is marked. What a crash leaves of an image is without a mark, and is not
touched yet or done; or it has a mark, and what it says is decided by the record: committed, the new bitmaps are in
force; prepared, the old ones. That holds for whoever reads, without a change on disk. Whoever opens the image for
writing first has the header say so (`engine.dirty_bitmaps.unfinished`), and `recover_transaction` does that for all
images and removes the record. Doing it twice does no harm. What the losing side had allocated remains as a leak.

**If the record is not to be had** nobody guesses. It is a name that comes from an image, so the policy has its say: a
confined image follows it only below its own directory, which is where it is for images in one directory. Else writers
are refused, readers are told that the bitmaps are in doubt, and the message names the command that finishes it. If the
record is lost for good, `forget_transaction` takes an image back to its old bitmaps. That is safe for each image by
itself: old bitmaps go on recording whatever is written.

**If another program writes to the image in between**, and is one that does not know marks, its changes are in the old
bitmaps at best, and the new ones must never come into force. The mark has an autoclear feature bit of its own: the
format demands of every program to clear those that it does not know when it opens an image for writing, before it
changes anything, and QEMU does. A mark without its bit is void. So the image keeps the bitmaps that the other program
left, with all changes in them or marked as unusable, and `recover_transaction` says so; it is the one case in which
not all images are on the same side, since then they were not on the same side of that program's writes either. This
package clears the bit likewise wherever a mark was not settled before.

**Errors** before 5 take everything back: marks off, new bitmaps given up, record removed. After 5 the images that can
be switched are, and the others take no changes any more and are switched when they are opened next. If marks cannot be
taken off, or it is not known whether 5 happened (as when the user interrupts just there), the images take no changes
any more and the record stays.

**In memory** every open image follows: its tracker knows the new bitmaps once its header is switched, and before the
next change of its disk those that are enabled are marked in use.

Only those images take part that change at all; if that is one, its header is switched and nothing else is needed.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qcow2_plugin.engine.dirty_bitmaps import unfinished
from qcow2_plugin.engine.dirty_bitmaps.bitmap_changes import Prepared, prepare_bitmaps
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange
from qcow2_plugin.engine.header_rewrite import rehearse
from qcow2_plugin.engine.layout import check_tables
from qcow2_plugin.engine.standing_still import at_rest
from qcow2_plugin.errors import OptionError, Qcow2Error, UnfinishedTransactionError, about_file
from qcow2_plugin.format.header import BitmapsPointer, Header
from qcow2_plugin.format.transaction import (
    EXTENSION_TRANSACTION,
    ID_SIZE,
    Mark,
    Record,
    committed,
    mark_of,
    marked,
    unmarked,
)
from qcow2_plugin.operations.bitmaps import opened_alone
from qcow2_plugin.operations.transaction_record import RecordFile
from qcow2_plugin.storage import directory

if TYPE_CHECKING:
    from qcow2_plugin.engine.image import Image
    from qcow2_plugin.engine.writable import WritableImage

Path = str | os.PathLike[str]


def bitmap_transaction(
    changes: Mapping[Image | Path, Sequence[BitmapChange]], *, record: Path | None = None, **options: Any
) -> None:
    """Change the bitmaps of several images, open ones or those at these paths: all of them, or none.

    `record` is a name for the file that decides after a crash (by default a new one in the directory of the first
    image that is a file), which is gone at the end. `options` for the images that are
    not open are `policy`, `data_file` and `base_directory`, as for `open_image`.

    Raises OptionError if the record exists or has to be named, or if an open image has been moved since; what
    `open_image` and `change_bitmaps` do, and then nothing has changed; UnfinishedTransactionError if the rest is left
    to the next `open_image` or to `recover_transaction`; OSError.
    """
    wanted = [(image, list(each)) for image, each in changes.items() if each]
    if not wanted:
        return
    with ExitStack() as opened_images:
        parties = [_Party(opened_images.enter_context(opened_alone(image, **options)), each) for image, each in wanted]
        for party in parties:
            party.require_place()
        Transaction(parties, _record_file(record, [party.path for party in parties])).run()


def _record_file(given: Path | None, images: list[str]) -> RecordFile:
    if given is not None:
        path = directory.absolute_path(given)
        if os.path.lexists(path):
            raise OptionError(
                "the record exists: finish that transaction first with 'qcow2 bitmap recover', or name another file",
                file=path,
            )
        return RecordFile(path)
    file = next((image for image in images if not stat.S_ISBLK(os.stat(image).st_mode)), None)
    if file is None:
        raise OptionError(
            "all images are block devices, and a file beside them would not outlive a restart of the system; "
            "name a file for the record (option record)"
        )
    return RecordFile(os.path.join(os.path.dirname(file), f"bitmaps-{secrets.token_hex(8)}.transaction"))


class Decider(Protocol):
    """What decides a transaction; see `RecordFile`."""

    path: str

    def create(self, record: Record) -> None:
        """Begin, with this record, durably. Raises OSError; then it has not begun."""

    def switch(self, record: Record) -> None:
        """Put this record in its place, durably. Raises as `RecordFile.switch` does."""

    def remove(self) -> None:
        """End. Raises OSError."""


@dataclass(slots=True, eq=False)
class _Party:
    """One image that takes part."""

    image: WritableImage
    changes: list[BitmapChange]
    prepared: Prepared | None = None
    is_marked: bool = False
    """Perhaps, on disk."""
    path: str = field(init=False)
    """Absolute."""

    def __post_init__(self) -> None:
        self.path = directory.absolute_path(self.image.layer.storage.path)

    @property
    def changes_something(self) -> bool:
        return self.prepared is not None and not self.prepared.is_empty

    @property
    def new_pointer(self) -> BitmapsPointer | None:
        return None if self.prepared is None else self.prepared.new

    def require_place(self) -> None:
        """Raises OptionError if the image is somewhere else than where it was opened."""
        if directory.identity_of(self.path) != self.image.layer.storage.identity:
            raise OptionError(
                "the image is no longer where it was opened, so the record could not name it; open it anew",
                file=self.path,
            )

    def prepare(self) -> None:
        self.prepared = prepare_bitmaps(self.image, self.changes)

    def require_room(self, mark: Mark) -> None:
        """Raises HeaderFullError unless the header can get the mark, and can lose it again either way."""
        file = self.image.file
        cluster_size = self.image.cluster_size
        stored = file.storage.pread(cluster_size, 0).ljust(cluster_size, b"\0")
        with about_file(self.path):
            stored, header = rehearse(stored, file.header, marked(file.header, mark))
            rehearse(stored, header, unmarked(header))
            rehearse(stored, header, committed(header, mark))

    def mark(self, mark: Mark) -> None:
        """Mark the image; durable after the next barrier."""
        self.is_marked = True
        self._change_header(marked(self.image.file.header, mark))

    def take_back(self) -> None:
        """Be as before, if the image still takes changes."""
        if self.is_marked and self.image.file.failure is None:
            self._change_header(unmarked(self.image.file.header))
            self.image.file.barrier()
            self.is_marked = False
        if not self.is_marked and self.prepared is not None:
            self.prepared.abandon()

    def publish(self) -> None:
        """Switch to the new bitmaps, durably."""
        assert self.prepared is not None
        bare = unmarked(self.image.file.header)
        self.prepared.publish(extensions=bare.extensions, autoclear_features=bare.autoclear_features)
        self.is_marked = False

    def publish_alone(self) -> None:
        """`publish` of an image that nobody else depends on: it happens here or not at all."""
        try:
            self.publish()
        except BaseException:
            self.take_back()
            raise

    def _change_header(self, header: Header) -> None:
        self.image.file.update_header(extensions=header.extensions, autoclear_features=header.autoclear_features)


class Transaction:
    """One transaction, from images that are open to images that have changed."""

    def __init__(self, parties: Sequence[_Party], decider: Decider) -> None:
        self._parties = parties
        self._active: list[_Party] = []
        self._decider = decider
        self._id = secrets.token_bytes(ID_SIZE)
        self._is_recorded = False

    @classmethod
    def of(cls, changes: Mapping[WritableImage, Sequence[BitmapChange]], decider: Decider) -> Transaction:
        """Of images that are open, decided by something that keeps a record."""
        return cls([_Party(image, list(each)) for image, each in changes.items()], decider)

    def run(self) -> None:
        """Raises as `bitmap_transaction` does."""
        with ExitStack() as still:
            for party in sorted(self._parties, key=_identity):
                still.enter_context(at_rest(party.image))
            try:
                self._decide()
                self._publish()
            finally:
                for party in self._active:
                    if party.is_marked:
                        party.image.file.fail("a change of the bitmaps of several images is not finished")

    def _decide(self) -> None:
        """Up to the moment at which the change happens. After an error everything is as before, or the record tells."""
        self._prepare()
        if not self._is_recorded:
            return
        try:
            self._decider.switch(self._record(is_committed=True))
        except OSError:
            self._take_back()
            raise

    def _prepare(self) -> None:
        """Up to the marks. After an error everything is as before."""
        try:
            for party in self._parties:
                party.prepare()
            self._active = [party for party in self._parties if party.changes_something]
            if len(self._active) < 2:
                return
            for party in self._active:
                party.require_room(self._mark_for(party))
            self._decider.create(self._record(is_committed=False))
            self._is_recorded = True
            for party in self._active:
                party.mark(self._mark_for(party))
            for party in self._active:
                party.image.file.barrier()
        except BaseException:
            self._take_back()
            raise

    def _take_back(self) -> None:
        for party in self._parties:
            with suppress(Qcow2Error, OSError):  # the error that led here says more
                party.take_back()
        if self._is_recorded and not any(party.is_marked for party in self._active):
            self._remove_record()

    def _publish(self) -> None:
        """What has happened shows in every image."""
        if not self._is_recorded:
            for party in self._active:
                party.publish_alone()
            return
        failures: list[Qcow2Error | OSError] = []
        for party in self._active:
            try:
                party.publish()
            except (Qcow2Error, OSError) as error:
                failures.append(error)
        if failures:
            raise UnfinishedTransactionError(
                f"the bitmaps have changed, but {len(failures)} of {len(self._active)} images do not say so yet "
                f"({failures[0]}); the next program of this package that writes to them finishes it, or "
                "'qcow2 bitmap recover RECORD'",
                file=self._decider.path,
            ) from failures[0]
        self._remove_record()

    def _remove_record(self) -> None:
        with suppress(OSError):  # no image asks for it any more
            self._decider.remove()

    def _record(self, *, is_committed: bool) -> Record:
        names = tuple(_seen_from(self._decider.path, party.path) for party in self._active)
        return Record(self._id, is_committed, names, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def _mark_for(self, party: _Party) -> Mark:
        return Mark(self._id, party.new_pointer, os.fsencode(_seen_from(party.path, self._decider.path)))


def _identity(party: _Party) -> tuple[int, int]:
    return party.image.layer.storage.identity


def _seen_from(file: str, other: str) -> str:
    """The name of `other` as it is told in `file`: relative if it lies in or below the directory of that."""
    start = os.path.dirname(file)
    if os.path.commonpath((start, other)) != start:
        return other
    return os.path.relpath(other, start)


# -- after a crash --


class Recovered(NamedTuple):
    """What became of one image of a transaction."""

    path: str
    outcome: str
    """"new": its bitmaps are as the transaction leaves them; "old": as they were before; "settled": it was done, or
    takes part in another transaction; "void": another program has written to it, and it keeps what that has left."""


def recover_transaction(record: Path) -> list[Recovered]:
    """Finish an interrupted transaction on all of its images, and remove its record.

    Other files are not opened. Raises CorruptImageError if it is no record; what stands in the way of an image, after
    the others are done, and then the record stays; OSError.
    """
    file = RecordFile(directory.absolute_path(record))
    told = file.read()
    recovered: list[Recovered] = []
    failures: list[Qcow2Error | OSError] = []
    for name in told.images:
        path = os.path.join(os.path.dirname(file.path), name)
        try:
            recovered.append(Recovered(path, _recover(path, file)))
        except (Qcow2Error, OSError) as error:
            failures.append(error)
    for failure in failures:
        raise failure
    file.remove()
    return recovered


def _recover(path: str, file: RecordFile) -> str:
    with unfinished.header_alone(path) as (storage, header):
        mark = mark_of(header)
        if mark is None:
            if not unfinished.has_void_mark(header):
                return "settled"
            unfinished.store(storage, header, unmarked(header))
            return "void"
        record = file.read()  # not before: whoever can still change it has the image locked
        if mark.id != record.id:
            return "settled"
        decided = unfinished.decide(header, mark, record, path)
        if decided.is_committed:
            check_tables(decided.header, storage, with_bitmaps=True)
        unfinished.store(storage, header, decided.header)
        return "new" if decided.is_committed else "old"


def forget_transaction(path: Path) -> bool:
    """Take an image whose record is lost for good back to the bitmaps that it had before; False if it had no mark.

    Raises NotQcow2Error, UnsupportedFeatureError, CorruptImageError (header), ImageLockedError; OSError.
    """
    with unfinished.header_alone(path) as (storage, header):
        before = unmarked(header)
        if header.extension_data(EXTENSION_TRANSACTION) is None and before.autoclear_features == (
            header.autoclear_features
        ):
            return False
        unfinished.store(storage, header, before)
        return True
