"""The node-local sidecar: one process group that holds every model of a node and answers thin functions."""
