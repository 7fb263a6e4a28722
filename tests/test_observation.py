"""One observation is encoded as many are, to the rounding of a float32."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from besteffort.arrivals import MAX_RATE_PER_S
from besteffort.kernels import write_fleet_row
from besteffort.observation import Encoding, FleetEncoding, Observation

NUM_TASKS, NUM_MODELS, NUM_SPANS = 4, 3, 3
PAPER = Encoding(NUM_TASKS, NUM_MODELS, 8.0, 24.0)
FLEET = FleetEncoding(NUM_TASKS, NUM_MODELS, (32.0, 32.0, 4.5), 24.0, (2.1, 8.4, 33.6))

RATES = st.floats(0.0, 1.1 * MAX_RATE_PER_S)
SEEN = st.builds(
    Observation,
    task=st.integers(0, NUM_TASKS - 1),
    batch_sizes=arrays(np.float64, NUM_MODELS, elements=st.floats(0.0, 1e6)),
    arrival_rate_per_s=RATES,
    neighbours=arrays(np.float64, (NUM_MODELS, NUM_MODELS), elements=st.integers(0, 10**6).map(float)),
)


@settings(deadline=None)  # the machine may be busy
@given(SEEN)
def test_the_papers_state_is_the_same_one_at_a_time(seen: Observation) -> None:
    one = np.full(PAPER.size, np.nan, dtype=np.float32)
    PAPER.encode_one(seen, one)
    rates = np.array([seen.arrival_rate_per_s])
    batch = PAPER.encode(np.array([seen.task]), seen.batch_sizes[None], rates)
    np.testing.assert_array_equal(one, batch[0])


@settings(deadline=None)  # the machine may be busy
@given(SEEN, st.lists(RATES, min_size=NUM_SPANS, max_size=NUM_SPANS))
def test_the_state_of_the_fleet_is_the_same_one_at_a_time(seen: Observation, recent: list[float]) -> None:
    assert seen.neighbours is not None
    one = np.full(FLEET.size, np.nan, dtype=np.float32)
    write_fleet_row(
        one, FLEET.scales, seen.task, seen.arrival_rate_per_s, np.array(recent),
        seen.batch_sizes, seen.neighbours,
    )  # fmt: skip
    of_fleet = FLEET.encode_fleet(seen.batch_sizes[None], seen.neighbours[None])
    rates = np.array([seen.arrival_rate_per_s])
    of_request = FLEET.encode_request(np.array([seen.task]), rates, np.array([recent]))
    # The two logarithms may round the last bit of a float64 each its own way.
    np.testing.assert_array_max_ulp(one, np.concatenate([of_fleet, of_request], axis=1)[0], maxulp=1)
