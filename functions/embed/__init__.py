"""The function embed: OpenFaaS imports this folder as the package `function`."""
