"""Who of `n` has the smallest key, kept as a tournament: a change replays the games on one way up.

It lies in `2 * n` records: the players, in their order, from `n` on, and at `k` the winner of `2 * k` and
`2 * k + 1`, down to 2: who wins in the end is told to the caller. Unlike in a heap, everyone keeps their
place: nothing points into it, and the way up is known beforehand, so that a processor fetches it all at
once. One player alone touches no memory.
"""

import numpy as np
from numpy.typing import NDArray

from besteffort.simulator.compiled import compiled

GAME = np.dtype([("key", "f8"), ("player", "i8")], align=True)


def tournament(players: NDArray[np.int64], key: float) -> NDArray[np.void]:
    """Of players who all have the same key; the lowest is first. Shape `(2 * n,)`."""
    games = np.zeros(2 * len(players), dtype=GAME)
    games["key"] = key
    games["player"][len(players) :] = players
    for place in range(len(players) - 1, 1, -1):
        games["player"][place] = games["player"][2 * place : 2 * place + 2].min()
    return games


@compiled
def play(
    games: NDArray[np.void], base: int, size: int, nth: int, key: float, player: int
) -> tuple[float, int]:
    """Give the `nth` player, whose name is `player`, another key; returns key and name of the winner.

    The tournament of `size` players lies in `games[base : base + 2 * size]`. Ties go to the lower name.
    """
    place = size + nth
    while place > 1:
        games[base + place]["key"] = key
        games[base + place]["player"] = player
        rival = games[base + (place ^ 1)]
        rival_key, rival_player = rival["key"], rival["player"]
        # No `and`, no `or`: a jump that nobody foresees costs more than a comparison.
        loses = (rival_key < key) | ((rival_key == key) & (rival_player < player))
        key = rival_key if loses else key
        player = rival_player if loses else player
        place >>= 1
    return key, player
