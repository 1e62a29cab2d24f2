"""`qcow2 info`: what an image says about itself, for people and, with QEMU's keys and values, for programs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.format.luks import LuksHeader
    from qcow2_plugin.operations.info import BitmapInfo, EncryptionInfo, ImageInfo, Qcow2Info, SnapshotInfo

_DESCRIPTION = """\
Show what a qcow2 image says about itself: sizes, features, backing and data file names, internal snapshots, dirty
bitmaps, encryption. Exactly one file is opened, read-only, whatever names it holds: safe for images from strangers.
"""
_EXAMPLES = """\
examples:
  qcow2 info upload.qcow2
  qcow2 info --output=json upload.qcow2 | jq '."virtual-size"'
  qcow2 info --backing-chain --policy=trusted overlay.qcow2
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "info",
        help="what an image says about itself",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text.add_output(parser)
    parser.add_argument("--backing-chain", action="store_true", help="also show every backing file below it")
    parser.add_argument("--all-snapshots", action="store_true", help="list all internal snapshots, however many")
    text.add_policy(parser, "confined", "with --backing-chain; without it no other file is opened; default: confined")
    text.add_below(parser)
    text.add_force_share(parser)
    text.add_image(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.info import DEFAULT_SNAPSHOT_LIMIT, info, info_chain
    from qcow2_plugin.storage.opener import Policy

    limit = None if arguments.all_snapshots else DEFAULT_SNAPSHOT_LIMIT
    share = arguments.force_share
    if arguments.backing_chain:
        infos = info_chain(
            arguments.image,
            policy=Policy(arguments.policy),
            backing_file=arguments.backing_file,
            backing_format=arguments.backing_format,
            base_directory=arguments.base_directory,
            force_share=share,
            snapshot_limit=limit,
        )
    else:
        infos = [info(arguments.image, force_share=share, snapshot_limit=limit)]
    if arguments.output == "json":
        _print_json(infos, as_list=arguments.backing_chain)
    else:
        print("\n".join(map(_for_people, infos)), end="")
    return 0


# -- JSON --


def _print_json(infos: list[ImageInfo], *, as_list: bool) -> None:
    import json

    objects = [as_json(info) for info in infos]
    print(json.dumps(objects if as_list else objects[0], indent=4))  # ASCII: odd bytes of names become \udcXX
    for info in infos:
        for note in _notes(info):
            text.warn(f"{note} ({printable(info.path)})")


def as_json(info: ImageInfo) -> dict[str, Any]:
    """`info` with the keys and values of `qemu-img info --output=json`.

    Of our own there is "snapshot-count", only where "snapshots" does not hold them all.
    """
    told: dict[str, Any] = {
        "filename": info.path,
        "format": "raw" if info.qcow2 is None else "qcow2",
        "virtual-size": info.virtual_size,
        "actual-size": info.allocated_size,
        "dirty-flag": info.qcow2 is not None and info.qcow2.dirty,
    }
    qcow2 = info.qcow2
    if qcow2 is None:
        return told
    told["cluster-size"] = qcow2.cluster_size
    if qcow2.encryption is not None:
        told["encrypted"] = True
    if qcow2.backing_file is not None:
        told["backing-filename"] = qcow2.backing_file
        told["full-backing-filename"] = qcow2.full_backing_file
        if qcow2.backing_format is not None:
            told["backing-filename-format"] = qcow2.backing_format
    if qcow2.snapshots and not qcow2.has_data_file:
        told["snapshots"] = [snapshot_as_json(snapshot) for snapshot in qcow2.snapshots]
        if len(qcow2.snapshots) < qcow2.snapshot_count:
            told["snapshot-count"] = qcow2.snapshot_count
    told["format-specific"] = {"type": "qcow2", "data": _details_as_json(qcow2)}
    return told


def _details_as_json(qcow2: Qcow2Info) -> dict[str, Any]:
    details: dict[str, Any] = {
        "compat": _compat(qcow2),
        "compression-type": qcow2.compression,
        "refcount-bits": qcow2.refcount_bits,
    }
    if qcow2.encryption is not None:
        details["encrypt"] = _encryption_as_json(qcow2.encryption)
    if qcow2.version < 3:
        return details
    details["lazy-refcounts"] = qcow2.lazy_refcounts
    details["corrupt"] = qcow2.corrupt
    details["extended-l2"] = qcow2.extended_l2
    if qcow2.data_file is not None:
        details["data-file"] = qcow2.data_file
    if qcow2.has_data_file:
        details["data-file-raw"] = qcow2.data_file_raw
    if qcow2.bitmaps:
        details["bitmaps"] = [
            {"name": bitmap.name, "granularity": bitmap.granularity, "flags": _flags(bitmap)}
            for bitmap in qcow2.bitmaps
        ]
    return details


def snapshot_as_json(snapshot: SnapshotInfo) -> dict[str, Any]:
    """A snapshot with the keys and values of qemu-img."""
    clock_seconds, clock_nanoseconds = divmod(snapshot.vm_clock_nanoseconds, 10**9)
    told = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": clock_seconds,
        "vm-clock-nsec": clock_nanoseconds,
    }
    return told if snapshot.icount is None else {**told, "icount": snapshot.icount}


def _encryption_as_json(encryption: EncryptionInfo) -> dict[str, Any]:
    told: dict[str, Any] = {"format": encryption.method}
    luks = encryption.luks
    if luks is None:
        return told
    told |= {
        "cipher-alg": luks.cipher_algorithm,
        "cipher-mode": luks.cipher_mode,
        "ivgen-alg": luks.iv_generator,
        "hash-alg": luks.hash,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.master_key_iterations,
        "uuid": luks.uuid,
        "slots": [
            {"active": True, "key-offset": slot.key_offset, "iters": slot.iterations, "stripes": slot.stripes}
            if slot.active
            else {"active": False, "key-offset": slot.key_offset}
            for slot in luks.slots
        ],
    }
    return told if luks.iv_hash is None else {**told, "ivgen-hash-alg": luks.iv_hash}


def _compat(qcow2: Qcow2Info) -> str:
    return "1.1" if qcow2.version > 2 else "0.10"


def _flags(bitmap: BitmapInfo) -> list[str]:
    return [flag for flag, is_set in (("in-use", bitmap.in_use), ("auto", bitmap.auto)) if is_set]


def _notes(info: ImageInfo) -> list[str]:
    """What the answer lacks."""
    qcow2 = info.qcow2
    if qcow2 is None:
        return []
    notes = list(qcow2.problems)
    if 0 < len(qcow2.snapshots) < qcow2.snapshot_count:
        notes.append(
            f"only the first {len(qcow2.snapshots)} of {qcow2.snapshot_count} snapshots are listed; "
            "--all-snapshots lists them all"
        )
    return notes


# -- people --


def _for_people(info: ImageInfo) -> str:
    qcow2 = info.qcow2
    lines = [
        ("image", printable(info.path)),
        ("format", "raw" if qcow2 is None else f"qcow2 version {qcow2.version} (compat {_compat(qcow2)})"),
        ("virtual size", text.size(info.virtual_size)),
        ("on disk", text.size(info.allocated_size)),
    ]
    if qcow2 is None:
        return text.fields(lines)
    if qcow2.backing_file is not None:
        lines += _backing_lines(qcow2)
    if qcow2.has_data_file:
        lines.append(("data file", _data_file(qcow2)))
    if qcow2.encryption is not None:
        lines.append(("encryption", _encryption(qcow2.encryption)))
    lines.append(("state", _state(qcow2)))
    return (
        text.fields(lines)
        + _section("Format", text.fields(_format_lines(qcow2), indent="  "))
        + (_key_slots(qcow2.encryption.luks) if qcow2.encryption and qcow2.encryption.luks else "")
        + _snapshots(qcow2)
        + _bitmaps(qcow2)
        + _section("Notes", "".join(f"  {note}\n" for note in _notes(info)))
    )


def _section(title: str, body: str) -> str:
    return f"\n{text.heading(title)}\n{body}" if body else ""


def _backing_lines(qcow2: Qcow2Info) -> list[tuple[str, str]]:
    backing_format = "format not recorded" if qcow2.backing_format is None else printable(qcow2.backing_format)
    lines = [("backing file", f"{printable(qcow2.backing_file or '')} ({backing_format})")]
    if qcow2.full_backing_file != qcow2.backing_file:
        lines.append(("", f"seen from here: {printable(qcow2.full_backing_file or '')}"))
    return lines


def _data_file(qcow2: Qcow2Info) -> str:
    name = "not named in the image" if qcow2.data_file is None else printable(qcow2.data_file)
    return f"{name} (a raw image of the disk)" if qcow2.data_file_raw else name


def _encryption(encryption: EncryptionInfo) -> str:
    luks = encryption.luks
    if luks is None:
        return encryption.method.upper()
    used = sum(slot.active for slot in luks.slots)
    cipher = f"{printable(luks.cipher_algorithm)} in {printable(luks.mode)}"
    return f"LUKS1, {cipher}, {used} of {len(luks.slots)} key slots in use"


def _state(qcow2: Qcow2Info) -> str:
    words = []
    if qcow2.corrupt:
        words.append("marked corrupt: repair it before it is written to")
    if qcow2.dirty:
        words.append("dirty: refcounts may be stale, reading is safe")
    return "; ".join(words) or "clean"


def _format_lines(qcow2: Qcow2Info) -> list[tuple[str, str]]:
    l2_entries = "standard"
    if qcow2.extended_l2:
        l2_entries = f"extended, subclusters of {text.short_size(qcow2.cluster_size // 32)}"
    return [
        ("cluster size", text.size(qcow2.cluster_size)),
        ("L2 entries", l2_entries),
        ("refcounts", f"{qcow2.refcount_bits} bits{', lazy' if qcow2.lazy_refcounts else ''}"),
        ("compression", qcow2.compression),
    ]


def _key_slots(luks: LuksHeader) -> str:
    lines = [
        ("hash", printable(luks.hash)),
        ("UUID", printable(luks.uuid)),
        ("payload", f"at {text.size(luks.payload_offset)}"),
        ("master key", f"{luks.master_key_iterations} iterations"),
    ]
    lines += [
        (f"key slot {number}", f"{slot.iterations} iterations") for number, slot in enumerate(luks.slots) if slot.active
    ]
    return _section("LUKS", text.fields(lines, indent="  "))


def _snapshots(qcow2: Qcow2Info) -> str:
    if not qcow2.snapshots:
        return ""
    rows = [
        (
            printable(snapshot.id),
            date(snapshot.date_seconds),
            text.short_size(snapshot.virtual_size),
            text.short_size(snapshot.vm_state_size) if snapshot.vm_state_size else "-",
            clock(snapshot.vm_clock_nanoseconds),
            printable(snapshot.name),
        )
        for snapshot in qcow2.snapshots
    ]
    titles = ("ID", "TAKEN (UTC)", "DISK", "VM STATE", "VM CLOCK", "NAME")
    title = f"Internal snapshots ({qcow2.snapshot_count})"
    return _section(title, text.table(titles, rows, right=frozenset({2, 3, 4})))


def date(seconds: int) -> str:
    """A time since the epoch, in UTC."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")


def clock(nanoseconds: int) -> str:
    """A time that something ran."""
    minutes, seconds = divmod(nanoseconds // 10**6, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds / 1000:06.3f}"


def _bitmaps(qcow2: Qcow2Info) -> str:
    if not qcow2.bitmaps:
        return ""
    rows = [
        (
            text.short_size(bitmap.granularity),
            "enabled" if bitmap.auto else "disabled",
            f"no: {bitmap.unusable}" if bitmap.unusable else "yes",
            printable(bitmap.name),
        )
        for bitmap in qcow2.bitmaps
    ]
    title = f"Dirty bitmaps ({len(qcow2.bitmaps)})"
    return _section(title, text.table(("GRANULARITY", "RECORDING", "USABLE", "NAME"), rows, right=frozenset({0})))
