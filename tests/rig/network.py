"""The rig's addresses.

They exist only inside the node's network namespace. The host must never get a route to them: when
the rig is down, a request to a pod's address would leave the machine.
"""

NODE_NAME = "node1"
NODE_IP = "10.199.0.1"
SERVICES = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
PODS = "10.244.0.0/24"
