"""How fast the engines of a fleet are at this moment, by a few steps of each of them alone.

Two runs of one trace cannot be nearer to each other than the machine is to itself. A virtual one may be a
tenth slower for minutes, since others use the same cores, and no counter of its own says so. Whatever is
measured while the fleet is loaded tells of its own load as well, so that this is for moments when it is idle.
"""

import asyncio

import numpy as np
from numpy.typing import NDArray

from besteffort.engines.client import open_session
from besteffort.engines.measure import Target, wave_paces_ms
from besteffort.engines.running import Engines
from besteffort.fleet import Fleet
from besteffort.profiling.design import BATCH_SIZE, SHORT_PROMPT

_NUM_STEPS = 64  # of a wave
_WATCHED_S = 1.0  # waves of each model, about
_TIMEOUT_S = 120.0


def steps_ms(fleet: Fleet, engines: Engines) -> NDArray[np.float64]:
    """A step of each model with a small batch, `(M,)`, by its first replica; nothing else may be under way.

    Raises:
        EngineError: an engine does not answer.
    """
    return asyncio.run(_steps_ms(fleet, engines))


async def _steps_ms(fleet: Fleet, engines: Engines) -> NDArray[np.float64]:
    rng = np.random.default_rng()  # prompts that were read before would be in the prefix cache
    room = fleet.engine.max_model_len - SHORT_PROMPT - 8
    found = []
    async with open_session(_TIMEOUT_S) as session:
        for model, (first, *_) in zip(fleet.models, engines, strict=True):
            target = Target(session, first.url, first.served_name, rng)
            paces: list[float] = []
            batch_size, num_steps = min(BATCH_SIZE, model.max_num_seqs), min(_NUM_STEPS, room)
            async for pace_ms in wave_paces_ms(target, batch_size, SHORT_PROMPT, num_steps, room):
                paces.append(pace_ms)
                if sum(paces) * num_steps >= 1000.0 * _WATCHED_S:
                    break
            found.append(float(np.median(paces)))
    return np.array(found)
