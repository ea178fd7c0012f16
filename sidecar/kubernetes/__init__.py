"""What of the sidecar speaks to Kubernetes: its API server, its scheduler, the kubelet. Nothing here is needed without it."""
