import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from besteffort.simulator.tournament import play, tournament


@settings(deadline=None)  # it compiles
@given(
    names=st.sets(st.integers(0, 1000), min_size=1, max_size=20),
    changes=st.lists(st.tuples(st.integers(0, 19), st.sampled_from([0.0, 1.0, 2.0, float("inf")]))),
    base=st.integers(0, 3),
)
def test_the_smallest_key_wins_and_of_equal_ones_the_lowest_name(
    names: set[int], changes: list[tuple[int, float]], base: int
) -> None:
    players = np.array(sorted(names))
    keys = dict.fromkeys(names, 1.0)
    lone = tournament(players, key=1.0)
    games = np.concatenate([np.zeros(base, dtype=lone.dtype), lone])
    for nth, key in changes:
        name = int(players[nth % len(players)])
        keys[name] = key
        winner = play(games, base, len(players), nth % len(players), key, name)
        assert winner == min((key, name) for name, key in keys.items())
