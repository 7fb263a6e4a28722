"""How fast engines are, seen while they are idle."""

import numpy as np
import pytest

from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.profiling import pace
from tests.fake_engine import FakeEngine, serving


def test_each_engine_s_step_is_timed_at_its_own_address(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_WATCHED_S", 0.1)
    slow, fast = FakeEngine("slow", 0.02, counts=True), FakeEngine("fast", 0.004, counts=True)
    with serving(slow.app) as one, serving(fast.app) as other:
        found = pace.steps_ms(fleet, ((Engine(one, "slow"),), (Engine(other, "fast"),)))
    assert found.shape == (2,)
    assert np.all(found >= [20.0, 4.0])  # it sleeps that long for each token
    assert found[0] > 2 * found[1]
    assert {body["model"] for body in slow.bodies} == {"slow"}
