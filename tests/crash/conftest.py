"""Prints what the crash and fault suites went through, in numbers."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.crash.campaign import FAULT_TALLIES, TALLIES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After the last test, if there were any of these."""
    if TALLIES:
        terminalreporter.section("crash states")
        for line in _crash_lines():
            terminalreporter.write_line(line)
    if FAULT_TALLIES:
        terminalreporter.section("fault sites")
        for name, tally in FAULT_TALLIES.items():
            told = ", ".join(f"{fault} {count}" for fault, count in sorted(tally.covered.items()))
            covered = f"call sites covered {tally.covered.total()} of {tally.total}"
            terminalreporter.write_line(f"{name:18} {covered}, in {tally.workloads} workloads: {told}")


def _crash_lines() -> list[str]:
    lines = []
    classes: Counter[str] = Counter()
    for name, tally in TALLIES.items():
        classes.update(tally.classes)
        lines.append(
            f"{name:18} {tally.unique:6} unique states of {tally.workloads} workloads; {tally.judged} judged, "
            f"{tally.leaking} with leaks, {tally.recovered} written to, {tally.second_crashes} after a second crash, "
            f"{tally.asked_qemu} by qemu-img"
        )
    unique, judged, wrong = (
        sum(getattr(tally, what) for tally in TALLIES.values()) for what in ("unique", "judged", "wrong")
    )
    told = ", ".join(f"{name} {count}" for name, count in classes.most_common())
    return [*lines, f"{'all kinds':18} {unique:6} unique states; {judged} judged, {wrong} wrong; {told}"]
