"""The targets that come with the package, and how they are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.adapters.backup.target import BackupTarget
from qcow2_plugin.errors import OptionError, TargetError, printable

OPTIONS = {
    "file": frozenset[str](),
    "s3": frozenset({"endpoint", "region", "credentials"}),
    "borg": frozenset({"passphrase"}),
    "restic": frozenset({"passphrase"}),
}
"""By scheme, the options that a target of it can have. `passphrase` and `credentials` are ids of secrets."""


def open_target(uri: str, options: Mapping[str, str], secret: Callable[[str, str], Secret]) -> BackupTarget | None:
    """The target that `uri` names, None if none of these.

    A path or file:PATH is a directory, s3://BUCKET/PREFIX is in S3, borg:REPOSITORY and restic:REPOSITORY are
    repositories of these programs. `secret` is called with the id of a secret and what it is for. Raises OptionError,
    OSError, TargetError and what `secret` raises.
    """
    scheme, separator, place = uri.partition(":")
    if not separator or "/" in scheme:
        scheme, place = "file", uri
    if scheme not in OPTIONS:
        return None
    for option in options.keys() - OPTIONS[scheme]:
        known = ", ".join(sorted(OPTIONS[scheme])) or "none"
        raise OptionError(f"{printable(option)!r} is no option of {scheme}: targets; these are: {known}")
    if not place:
        raise OptionError(f"{printable(uri)!r} names no place to keep backups at")
    secrets = {option: secret(options[option], uri) for option in ("passphrase", "credentials") if option in options}
    match scheme:
        case "s3":
            try:
                from qcow2_plugin.adapters.backup.targets.s3 import S3Target
            except ModuleNotFoundError as error:
                raise TargetError("s3: targets need obstore: pip install 'qcow2-plugin[s3]'") from error

            return S3Target(uri, options.get("endpoint"), options.get("region"), credentials=secrets.get("credentials"))
        case "borg":
            from qcow2_plugin.adapters.backup.targets.borg import BorgTarget

            return BorgTarget(place, secrets.get("passphrase"))
        case "restic":
            from qcow2_plugin.adapters.backup.targets.restic import ResticTarget

            return ResticTarget(place, secrets.get("passphrase"))
    from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget

    return DirectoryTarget(place.removeprefix("//") if separator and scheme == "file" else place)
