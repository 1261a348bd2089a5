"""`tuneyard run`: a plan carried out on this machine and shown on a terminal.

It holds the command's entry point (`run`) and its display (`console`, `views`).
It may not hold anything that a cluster needs.
"""
