"""The function similar: OpenFaaS imports this folder as the package `function`."""
