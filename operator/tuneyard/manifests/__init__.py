"""YAML in, faults or a job out.

What lives here: the manifest reader, which reports every fault at once with its field path and
line; the CRD generator; a manifest to start from. What may not enter: planning, clock, network.
"""
