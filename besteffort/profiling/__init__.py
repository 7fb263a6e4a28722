"""What is measured of a fleet, in which order, for how long, and what it says."""

from besteffort.profiling.design import Run, plan_runs
from besteffort.profiling.measuring import Effort, measure_fleet
from besteffort.profiling.origin import doubts, origin_of

__all__ = ["Effort", "Run", "doubts", "measure_fleet", "origin_of", "plan_runs"]
