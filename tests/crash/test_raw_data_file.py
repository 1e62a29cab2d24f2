"""A raw data file is, after every request that was answered, what the guest sees. Without any crash."""

from __future__ import annotations

import pytest

from tests.crash.oracles import judge_closed
from tests.crash.scenario import Scenario
from tests.crash.workloads import workload


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["raw_data_file", "extended_raw", "raw_data_file_bitmap"])
def test_the_data_file_equals_the_disk_after_every_request(kind: str, seed: int) -> None:
    chosen = workload(f"{kind}/random+100/any/{seed}")
    scenario = Scenario.of(chosen.kind)
    assert scenario.is_raw
    for request in chosen.requests:
        scenario.do(request)
        assert scenario.problem() is None
        size = len(scenario.history.view)
        assert scenario.contents[1][:size] == bytes(scenario.history.view), request
    judge_closed(scenario)
