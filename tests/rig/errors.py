"""The exception of the rig."""


class RigError(Exception):
    """A rig cannot be built, started, used or stopped; the message gives the reason."""
