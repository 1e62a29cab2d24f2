"""Makes one crash again, as a failed test names it: `python -m tests.crash WORKLOAD [NUMBER]`.

Prints the requests, the storage calls, and what is wrong; without a number, whether all goes well without a crash.
"""

from __future__ import annotations

import sys

import tests.conftest  # noqa: F401 # the profile decides how much is tried
from tests.crash.campaign import CrashError, judge_one, run
from tests.crash.scenario import Scenario, WrongError
from tests.crash.workloads import workload


def main() -> int:
    """The exit status: 1 if something is wrong."""
    chosen = workload(sys.argv[1])
    scenario = Scenario.of(chosen.kind)
    try:
        scenario.run(chosen.requests)
    except WrongError as error:
        print(error)
    for request in scenario.history.requests:
        print(f"calls {request.start} to {request.end}: {request.name}")
    for number, call in enumerate(scenario.log.calls):
        print(f"{number:4} {call}")
    try:
        if len(sys.argv) < 3:
            run(chosen)
        else:
            plan = judge_one(chosen, int(sys.argv[2]))
            print(f"{plan.kind.value} state of interval {plan.interval}: {', '.join(map(str, plan.recipes))}")
    except CrashError as error:
        print(error)
        return 1
    print("nothing is wrong")
    return 0


sys.exit(main())
