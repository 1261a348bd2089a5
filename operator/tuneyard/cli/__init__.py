"""Every command of `tuneyard`.

What lives here: the commands (`main`, `cluster_commands`), what they print, and the Kubernetes
client of those that talk to a cluster. `cluster` alone imports that client and is imported only
once a command runs; `jobs` and `views` are pure, the clock is an argument. Whatever can go wrong
outside ends as a RemoteError: one message, exit code 2.
"""
