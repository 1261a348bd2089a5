"""One attempt on a cluster: the driver on the head pod.

It holds the driver, its progress posts to the operator, and its log.
It may not use the Kubernetes API, which only the operator uses.
"""
