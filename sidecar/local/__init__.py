"""`trunkline up`: a stack.yml run on this machine without containers, the way OpenFaaS would run it."""

from sidecar.local.runner import LocalStack, up

__all__ = ["LocalStack", "up"]
