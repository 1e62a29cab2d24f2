"""What is done to an image before it crashes: a small alphabet of requests, alone, in pairs, or many at random.

A workload is named by one line of text, from which it can be made again: `KIND/OPERATIONS/FORM/SEED`. OPERATIONS are
names of the alphabet joined by "+", or "random" and how many. FORM says when it is flushed: "each" after every one,
"late" once, before the image is closed, "never" not even by closing; random ones flush when they like.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, NamedTuple

from tests.crash.kinds import Kind, kind

SECTOR = 512
ALPHABET = (
    "write_part", "write_cluster", "write_across", "write_durable", "zero_keep", "zero_unmap", "discard", "flush",
    "grow", "shrink", "reopen",
)  # fmt: skip
RESIZING = ("grow", "shrink")
FORMS = ("each", "late")

Verb = Literal["write", "write durably", "zero", "zero and unmap", "discard", "flush", "resize", "reopen", "close"]


class Request(NamedTuple):
    """One request; `offset` is the new size for "resize"."""

    verb: Verb
    offset: int = 0
    length: int = 0

    def __str__(self) -> str:
        return (
            self.verb if self.verb in ("flush", "reopen", "close") else f"{self.verb} {self.offset:#x}+{self.length:#x}"
        )


class Workload(NamedTuple):
    """What is done to which kind of image."""

    name: str
    kind: Kind
    requests: tuple[Request, ...]


def workload(name: str) -> Workload:
    """The workload of this name."""
    kind_name, operations, form, seed = name.split("/")
    chosen = kind(kind_name)
    chance = random.Random(name)
    words = operations.split("+")
    if words[0] == "random":
        return Workload(name, chosen, tuple(_random(chosen, int(words[1]), chance)))
    del seed  # it is a part of the name, which seeds everything
    spot = _spot(chosen, chance)
    requests = []
    for word in words:
        if chance.random() < 0.4:
            spot = _spot(chosen, chance)
        requests.append(request(word, chosen, spot, chance))
        if form == "each" and requests[-1].verb not in ("flush", "reopen"):
            requests.append(Request("flush"))
    if form == "late" and requests[-1].verb != "flush":
        requests.append(Request("flush"))
    return Workload(name, chosen, (*requests, Request("close")))


def singles_and_pairs(kind_name: str, seed: int, *, both_forms: bool) -> Iterator[str]:
    """Names of workloads of one operation, and of two; without `both_forms` these have either form in turn."""
    words = [word for word in ALPHABET if kind(kind_name).sizes or word not in RESIZING]
    for first in words:
        yield f"{kind_name}/{first}/each/{seed}"
    for index, first in enumerate(words):
        for number, second in enumerate(words):
            forms = FORMS if both_forms else (FORMS[(index + number + seed) % 2],)
            for form in forms:
                yield f"{kind_name}/{first}+{second}/{form}/{seed}"


def request(word: str, image: Kind, cluster: int, chance: random.Random) -> Request:
    """A request of this name, at or around a guest cluster."""
    size, offset = image.cluster_size, cluster * image.cluster_size
    part = _part(size, chance)
    whole = size * chance.choice([1, 1, 2, 5])
    if word in ("write_part", "write_durable"):
        return Request("write" if word == "write_part" else "write durably", offset + part[0], part[1])
    if word == "write_cluster":
        return Request("write", offset, whole)
    if word == "write_across":
        border = image.l2_coverage * chance.randint(1, max(len(image.view) // image.l2_coverage, 1))
        border = border if border < len(image.view) else offset + size
        before = min(border, size * chance.randint(1, 3) - chance.choice([0, 0, 7]))
        return Request("write", border - before, before + size * 2 + chance.choice([0, 0, 5]))
    if word in ("zero_keep", "zero_unmap"):
        start, length = chance.choice([(0, whole), (0, whole), part, (part[0], whole)])
        return Request("zero" if word == "zero_keep" else "zero and unmap", offset + start, length)
    if word == "discard":
        return Request("discard", offset, chance.choice([whole, whole, whole + size // 2]))
    if word == "grow":
        return Request("resize", chance.choice([each for each in image.sizes if each > len(image.view)]))
    if word == "shrink":
        return Request("resize", chance.choice([each for each in image.sizes if each < len(image.view)]))
    assert word in ("flush", "reopen"), word
    return Request("flush" if word == "flush" else "reopen")


def _part(size: int, chance: random.Random) -> tuple[int, int]:
    """Offset and length of something smaller than a cluster, often of whole sectors."""
    unit = SECTOR if size > SECTOR and chance.random() < 0.6 else 1
    start = chance.randrange(0, size, unit)
    return start, max(unit, chance.choice([unit, (size - start) // 2 // unit * unit, size // 32 // unit * unit]))


def _spot(image: Kind, chance: random.Random) -> int:
    return chance.choice(image.spots[chance.choice(sorted(image.spots))])


def _random(image: Kind, count: int, chance: random.Random) -> Iterator[Request]:
    """So many requests, a fourth of them flushes, some reopenings; a few places come again and again."""
    spots = [_spot(image, chance) for _ in range(6)]
    words = [word for word in ALPHABET if word not in ("flush", "reopen", *RESIZING)]
    for _ in range(count):
        pick = chance.random()
        if pick < 0.22:
            yield Request("flush")
        elif pick < 0.27:
            yield request(chance.choice(["reopen", *(RESIZING if image.sizes else ())]), image, 0, chance)
        else:
            spot = chance.choice(spots) if chance.random() < 0.7 else _spot(image, chance)
            yield request(chance.choice(words), image, max(spot + chance.choice([0, 0, 1, -1]), 0), chance)
    yield Request("flush")
    yield Request("close")
