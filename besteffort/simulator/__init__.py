"""A fleet under continuous batching, event by event, and how its requests fare (no torch here).

What happens at one instant has an order: completions come before arrivals, and arrivals are in the
order of the trace. The model of a replica is a fluid one, stated in `docs/dqn.md`.
"""

from besteffort.simulator.branching import Branching, Routing
from besteffort.simulator.fleets import ParallelFleets, simulate, simulate_choices
from besteffort.simulator.trials import PlanSearch, ThresholdTrials

__all__ = [
    "Branching",
    "ParallelFleets",
    "PlanSearch",
    "Routing",
    "ThresholdTrials",
    "simulate",
    "simulate_choices",
]
