"""A real Kubernetes on one Linux machine, for the tests that need one.

`build` builds the programs, `rig` brings a rig up and takes it down, and two processes run it:
`keeper` outside the rig's namespaces and `supervisor` inside them.

This package imports the standard library only, because the rig starts outside of any virtual
environment. `plugin` and the tests also import pytest. Nothing here depends on Tuneyard.
"""
