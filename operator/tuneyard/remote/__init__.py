"""What the command line does with a cluster: shows jobs, their logs, and changes their run policy.

The laws of this room: `cluster` alone imports the Kubernetes client and does I/O with it, and is
imported only once a command runs; `jobs` and `views` are pure, the clock is an argument. Whatever
can go wrong outside ends as a RemoteError: one message, exit code 2.
"""
