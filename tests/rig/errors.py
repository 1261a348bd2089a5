"""What can go wrong with a rig, as one exception that a person can read."""


class RigError(Exception):
    """The rig could not be built, started or stopped; the message says why and what to do."""
