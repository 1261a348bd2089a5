"""The commands of `tuneyard`.

`main` and `cluster_commands` hold the commands, `plan_view` and `views` their output. Only
`cluster` imports the Kubernetes client, once a command needs it. `jobs` and `views` are pure; they
take the time as an argument. Every problem with a cluster is a RemoteError: one message, exit code
2.
"""
