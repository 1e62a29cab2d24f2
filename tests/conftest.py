"""How hard the property tests try.

By default the examples are the same in every run, and few enough for every commit. QCOW2_TEST_DEPTH=deep makes them
random and twenty times as many.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_SHARED = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", derandomize=True, max_examples=100, **_SHARED)  # type: ignore[arg-type] # a dict
settings.register_profile("deep", derandomize=False, max_examples=2000, print_blob=True, **_SHARED)  # type: ignore[arg-type] # a dict
settings.load_profile(os.environ.get("QCOW2_TEST_DEPTH", "quick"))
