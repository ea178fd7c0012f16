"""Groups of commands whose help lists them as they were registered: those of one kind are beside each other."""

from __future__ import annotations

import click


class Ordered(click.Group):
    """A group whose commands are not sorted by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of registration."""
        return list(self.commands)
