"""From a plan to Kubernetes objects.

What lives here: the RayJob, its ConfigMap, volumes and placement. The law of this room is purity:
no clock, environment, randomness or I/O.
"""
