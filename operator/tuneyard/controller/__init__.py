"""The operator: watches, a work queue, status writes and the status server. The decisions are made
in `status`."""
