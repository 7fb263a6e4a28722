"""The files of a fleet, each with a schema version, its provenance, and a check when it is read."""
