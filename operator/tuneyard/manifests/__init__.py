"""Manifests: the reader, the CRDs, and a manifest to start from.

The reader returns jobs, or reports all faults at once, each with its field path and line. This
package has no planning, no clock and no network.
"""
