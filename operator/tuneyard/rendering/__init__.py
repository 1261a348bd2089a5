"""Render a plan as Kubernetes objects: the RayJob, its ConfigMap, volumes and placement.

The package is pure: no clock, environment, randomness or I/O.
"""
