"""May this image be opened? A verdict on an image that somebody else made, from its header alone.

For services that take in images: one file is opened, nothing is written, and no name in the image is followed. The
verdict says what the image is, which other files it wants, and whether the given policy would let it have them. Names
are judged as text; whether the files exist, and what they are, only opening them can tell.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from qcow2_plugin.engine.header import read_header, refusals
from qcow2_plugin.errors import NotQcow2Error, Qcow2Error, printable
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.transaction import is_marked
from qcow2_plugin.storage.opener import Policy, broken_rule, open_given


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of an image before anything in it is believed. `reasons` are safe to print, names are not.

    `accepted` is True if there is nothing against opening the image under `policy`: no reasons.
    """

    policy: str
    accepted: bool
    reasons: tuple[str, ...]
    is_qcow2: bool
    virtual_size: int | None = None
    """Bytes; None, like all that follows, if the header could not be read."""
    encryption: str | None = None
    dirty: bool | None = None
    corrupt: bool | None = None
    needs_data_file: bool | None = None
    data_file: str | None = None
    needs_backing_file: bool | None = None
    backing_file: str | None = None
    backing_format: str | None = None


def vet(path: str | os.PathLike[str], *, policy: Policy = Policy.CONFINED, force_share: bool = False) -> Verdict:
    """Judge the image at `path`. Raises OSError and ImageLockedError; everything else is part of the verdict."""
    storage = open_given(path, force_share=force_share)
    try:
        header = read_header(storage)
    except Qcow2Error as error:
        is_qcow2 = not isinstance(error, NotQcow2Error)
        return Verdict(policy.value, False, (error.detail,), is_qcow2)
    finally:
        storage.close()
    reasons = tuple(_reasons(header, policy))
    return Verdict(
        policy=policy.value,
        accepted=not reasons,
        reasons=reasons,
        is_qcow2=True,
        virtual_size=header.virtual_size,
        encryption=header.encryption_method.name.lower(),
        dirty=header.dirty,
        corrupt=header.corrupt,
        needs_data_file=header.has_data_file,
        data_file=_text(header.data_file),
        needs_backing_file=header.backing_file is not None,
        backing_file=_text(header.backing_file),
        backing_format=_text(header.backing_format),
    )


def _reasons(header: Header, policy: Policy) -> list[str]:
    reasons = [refusal.detail for refusal in refusals(header)]
    if is_marked(header):
        reasons.append("it takes part in a change of the bitmaps of several images, which was interrupted")
    if header.has_data_file:
        reasons += _against_name(header.data_file, "data file", policy)
    if header.backing_file is not None:
        reasons += _against_name(header.backing_file, "backing file", policy)
        if header.backing_format is None:
            reasons.append("the format of the backing file is not recorded")
        elif header.backing_format not in (b"qcow2", b"raw"):
            reasons.append(f'backing file format "{printable(header.backing_format)}" is not supported')
    return reasons


def _against_name(name: bytes | None, role: str, policy: Policy) -> list[str]:
    if name is None:
        return [f"it needs a {role} and does not name it"]
    rule = broken_rule(name, policy)
    return [] if rule is None else [f"its {role} would not be opened: {rule}"]


def _text(name: bytes | None) -> str | None:
    return None if name is None else os.fsdecode(name)
