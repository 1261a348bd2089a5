"""One attempt on a cluster: the driver on the head pod.

What lives here: the driver, its progress posts to the operator, and its log. What may not enter:
the Kubernetes API, which only the operator uses.
"""
