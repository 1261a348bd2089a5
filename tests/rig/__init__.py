"""A real Kubernetes on one Linux machine, for the tests that need one.

What lives here: building the programs (`build`), bringing a rig up and down (`rig`), and the two
processes that run it: `keeper` outside the rig's namespaces and `supervisor` inside them.

What may not enter: anything beyond the standard library (the rig starts before, and outside of, any
virtual environment), and anything of Tuneyard itself: this package knows Kubernetes only.
"""
