"""How long the models take: what the simulator and the predicting policies use of a profile."""

from besteffort.latency.fit import fit_latency, fitted_ms
from besteffort.latency.model import Latency
from besteffort.latency.samples import Sample, Served

__all__ = ["Latency", "Sample", "Served", "fit_latency", "fitted_ms"]
