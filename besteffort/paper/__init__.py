"""The paper's experiments, all of them, in the simulator: run, drawn, and set beside what it printed."""

from besteffort.paper.experiments import Effort, Experiments, run_experiments
from besteffort.paper.page import write_pages

__all__ = ["Effort", "Experiments", "run_experiments", "write_pages"]
