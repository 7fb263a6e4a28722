"""Production traces made into requests that a fleet can serve, by a stated rule."""

from pathlib import Path
from typing import Any

import numpy as np

from besteffort.artifacts import files
from besteffort.errors import UsageError
from besteffort.fleet import Fleet
from besteffort.request import Requests
from besteffort.trace.sources import FORMATS, SourceArrivals

RULE = (
    "the first num_requests of the source; times from the first arrival, times time_stretch; tasks drawn "
    "independently by the fleet's shares; outputs clipped to max_output_tokens, then prompts to what is "
    "left of max_model_len"
)


def import_trace(
    path: Path,
    source_format: str,
    fleet: Fleet,
    seed: int,
    *,
    num_requests: int | None = None,
    time_stretch: float = 1.0,
    max_output_tokens: int | None = None,
) -> tuple[Requests, dict[str, Any]]:
    """Read a production trace and fit it to a fleet; also the facts for its provenance.

    Raises:
        UsageError: an unknown format, or an option that is out of range.
        TraceError: the source is malformed.
    """
    if source_format not in FORMATS:
        raise UsageError(f"{source_format!r} is no known format: choose one of {', '.join(FORMATS)}")
    if num_requests is not None and num_requests < 1:
        raise UsageError(f"the number of requests is {num_requests}: it must be at least 1")
    arrivals = FORMATS[source_format](path, num_requests)
    if num_requests is not None and len(arrivals) < num_requests:
        raise UsageError(
            f"{path} holds {len(arrivals)} requests, not {num_requests}: ask for {len(arrivals)} or fewer"
        )
    rng = np.random.default_rng(seed)
    requests, facts = fit_to_fleet(
        arrivals, fleet, rng, time_stretch=time_stretch, max_output_tokens=max_output_tokens
    )
    source = {"source": path.name, "source_sha256": files.sha256(path), "format": source_format, "seed": seed}
    return requests, {**source, **facts}


def fit_to_fleet(
    arrivals: SourceArrivals,
    fleet: Fleet,
    rng: np.random.Generator,
    *,
    time_stretch: float = 1.0,
    max_output_tokens: int | None = None,
) -> tuple[Requests, dict[str, Any]]:
    """Make arrivals into requests that the fleet can serve, by `RULE`; also the facts about it.

    `time_stretch` 2 makes the trace last twice as long, at half the rate. `max_output_tokens` is a
    quarter of the fleet's `max_model_len` unless it is given.

    Raises:
        UsageError: an option is out of range.
    """
    limit = fleet.engine.max_model_len
    max_output_tokens = limit // 4 if max_output_tokens is None else max_output_tokens
    _check_options(time_stretch, max_output_tokens, limit)
    output = np.minimum(arrivals.num_output_tokens, max_output_tokens)
    prompt = np.minimum(arrivals.num_prompt_tokens, limit - output)
    requests = Requests(
        arrived_at=(arrivals.arrived_at - arrivals.arrived_at[0]) * time_stretch,
        task=rng.choice(len(fleet.tasks), size=len(arrivals), p=fleet.task_shares),
        num_prompt_tokens=prompt,
        num_output_tokens=output,
    )
    facts = {
        "fleet": fleet.name,
        "rule": RULE,
        "num_requests": len(arrivals),
        "time_stretch": time_stretch,
        "max_output_tokens": max_output_tokens,
        "max_model_len": limit,
        "num_clipped_outputs": int((output < arrivals.num_output_tokens).sum()),
        "num_clipped_prompts": int((prompt < arrivals.num_prompt_tokens).sum()),
    }
    return requests, facts


def _check_options(time_stretch: float, max_output_tokens: int, limit: int) -> None:
    if not 0 < time_stretch <= 1e6:  # also catches NaN
        raise UsageError(f"the time stretch is {time_stretch}: it must be above 0, and at most 1000000")
    if not 1 <= max_output_tokens < limit:
        raise UsageError(
            f"at most {max_output_tokens} output tokens: choose a number from 1 to {limit - 1}, "
            "so that a prompt fits into the fleet's engine.max_model_len beside them"
        )
