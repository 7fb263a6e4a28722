"""How near the simulator comes to the real engines: one trace, served by both by the same policies."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from besteffort.fleet import Fleet
from besteffort.report.comparison import NOTHING, ComparisonTable, figure, percent
from besteffort.request import Outcomes

EVERYTHING = "all models"
_FEW = 20  # requests: fewer say little of a model's mean, and nothing of its p95
_RANKS = ("mean", "p50", "p95")


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two orders of the same things, -1 to 1; None where one of them is all ties."""
    pairs = list(combinations(range(len(first)), 2))
    signs = np.array([[np.sign(of[i] - of[j]) for i, j in pairs] for of in (first, second)])
    norm = np.sqrt(np.prod(np.sum(signs**2, axis=1))) if pairs else 0.0
    return float(np.sum(signs[0] * signs[1]) / norm) if norm else None


def differences(real: Outcomes, simulated: Outcomes, fleet: Fleet) -> dict[str, dict[str, Any]]:
    """By model that got requests from both, and over all: `num_requests`, and by quantity the figures.

    Of `latency_ms_per_token` and `ttft_ms` the mean, p50 and p95 of both, and the simulator's relative
    error. Where a policy looks at the fleet, the two may send different requests to a model.
    """
    found = {}
    for m in (None, *range(len(fleet.models))):
        rows = [of.answered & ((of.model == m) if m is not None else True) for of in (real, simulated)]
        if all(which.any() for which in rows):
            found[EVERYTHING if m is None else fleet.model_names[m]] = {
                "num_requests": {"vllm": int(rows[0].sum()), "simulated": int(rows[1].sum())},
                "latency_ms_per_token": _errors(
                    real.latency_ms_per_token[rows[0]], simulated.latency_ms_per_token[rows[1]]
                ),
                "ttft_ms": _errors(real.ttft_ms[rows[0]], simulated.ttft_ms[rows[1]]),
            }
    return found


def _errors(real: NDArray[np.float64], simulated: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    figures = {}
    for rank in _RANKS:
        measured, made = (
            float(np.mean(of) if rank == "mean" else np.percentile(of, int(rank[1:])))
            for of in (real, simulated)
        )
        figures[rank] = {"vllm": measured, "simulated": made, "error": (made - measured) / measured}
    return figures


def fidelity(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over several policies: how far their figures are apart, and whether their order is the same.

    Each of `pairs` has the `policy`, the summaries `vllm` and `simulated`, and their `differences`.
    """
    values = {
        what: [[pair[engine][what] for pair in pairs] for engine in ("vllm", "simulated")]
        for what in ("performance", "deadline_met")
    }
    apart = {
        what: [made - measured for measured, made in zip(*of, strict=True)] for what, of in values.items()
    }
    return {
        "policies": [pair["policy"] for pair in pairs],
        "kendall_tau": kendall_tau(*values["performance"]),
        "performance_apart": apart["performance"],
        "deadline_met_apart": apart["deadline_met"],
        "pairs": list(pairs),
    }


def fidelity_table(found: dict[str, Any]) -> ComparisonTable:
    """A row per policy, and below it one for each model with enough requests to say something."""
    headers = ["policy", "requests", "performance", "deadlines met", *(f"latency {r}" for r in _RANKS),
               *(f"ttft {r}" for r in _RANKS)]  # fmt: skip
    rows = []
    for pair in found["pairs"]:
        for of, block in pair["differences"].items():
            number = block["num_requests"]
            if of != EVERYTHING and min(number.values()) < _FEW:
                continue
            rows.append([
                pair["policy"] if of == EVERYTHING else f"  {of}",
                f"{number['simulated']} / {number['vllm']}" if of != EVERYTHING else f"{number['vllm']}",
                *(_outcome(pair, "performance", of), _outcome(pair, "deadline_met", of)),
                *(_error(block["latency_ms_per_token"][rank]) for rank in _RANKS),
                *(_error(block["ttft_ms"][rank]) for rank in _RANKS),
            ])  # fmt: skip
    return ComparisonTable(headers, rows)


def _outcome(pair: dict[str, Any], what: str, of: str) -> str:
    if of != EVERYTHING:
        return ""
    show = (lambda value: figure(value, 3)) if what == "performance" else percent
    return f"{show(pair['simulated'][what])} / {show(pair['vllm'][what])}"


def _error(cell: dict[str, float]) -> str:
    if not np.isfinite(cell["error"]):
        return NOTHING
    return f"{cell['simulated']:.1f} / {cell['vllm']:.1f} ({100 * cell['error']:+.0f} %)"
