"""`python -m sidecar`: the command line, which is in `sidecar.cli`."""

from sidecar.cli.main import main

if __name__ == "__main__":
    main()
