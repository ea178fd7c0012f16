"""The function classify: OpenFaaS imports this folder as the package `function`."""
