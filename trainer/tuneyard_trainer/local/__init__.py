"""`tuneyard run`: a plan carried out on this machine and shown on a terminal.

What lives here: the command's entry point and its display. What may not enter: anything that a
cluster needs.
"""
