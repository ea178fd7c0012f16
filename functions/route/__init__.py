"""The function route: OpenFaaS imports this folder as the package `function`."""
