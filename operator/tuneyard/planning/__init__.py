"""The planner: what a job means, as data.

What lives here: `stages` (job -> Plan), `defaults` (the rules behind `auto`), `fingerprint` (a
stage's identity) and `rayjob` (Plan -> Kubernetes objects). The law of the room is purity: no
clock, no environment, no randomness, no I/O. The same manifest gives the same bytes on every
machine and at every time, so everything here is tested without a cluster and without a mock. It
imports `api` and `errors`, and nobody imports it but the controller and the command line.
"""
