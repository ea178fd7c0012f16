"""The command line. Commands parse and print; the work is done by the modules they import, when they are called.

Must not import torch, nor what imports it, before `serve` or `pack` is called: looking and pushing have to be quick.
"""
