"""The logs of the driver and of the workers, kept in the output after the pods are gone.

A helper process beside each of them copies its log, without secrets, in bounded size. The helper
survives the process that it watches, so that a crash of a native library is in the log too.
"""
