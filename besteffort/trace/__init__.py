"""Traces: when requests arrive, of which task and how long; as files, and from other people's files."""

from besteffort.trace.description import describe_trace
from besteffort.trace.file import SCHEMA, VERSION, Trace, load_trace, read_trace, save_trace
from besteffort.trace.fitting import RULE, fit_to_fleet, import_trace
from besteffort.trace.sources import FORMATS, SourceArrivals, import_azure_llm, import_mooncake

__all__ = [
    "FORMATS",
    "RULE",
    "SCHEMA",
    "VERSION",
    "SourceArrivals",
    "Trace",
    "describe_trace",
    "fit_to_fleet",
    "import_azure_llm",
    "import_mooncake",
    "import_trace",
    "load_trace",
    "read_trace",
    "save_trace",
]
