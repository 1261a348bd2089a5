"""Walks a plan: alone, under torchrun, or in a Ray worker group.

What lives here: the runner, which skips every stage whose record matches and runs the others; the
worker group; the names of failures. What may not enter: what a stage does. Only `distributed`
imports Ray.
"""
