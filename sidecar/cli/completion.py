"""`trunkline completion`: scripts with which shells complete commands, options and the names of models and tenants."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

_PROGRAM = "trunkline"
_SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command()
@click.argument("shell", type=click.Choice(list(_SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes words in a shell.

    For bash, put `eval "$(trunkline completion bash)"` into ~/.bashrc; for zsh, the same with zsh into ~/.zshrc; for fish, write
    what is printed to ~/.config/fish/completions/trunkline.fish.
    """
    made = _SHELLS[shell](ctx.find_root().command, {}, _PROGRAM, f"_{_PROGRAM.upper()}_COMPLETE")
    # Without click's look at the version of a shell that need not be on this machine.
    click.echo(made.source_template % made.source_vars())
