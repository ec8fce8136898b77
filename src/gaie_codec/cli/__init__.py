"""`gaie-codec`: run the shims (`serve`, `ext-proc`, `sim`), debug payloads (`transcode`), check servers, protos, pools and EPPs.

Wrong input ends with exit status 2 and one line on stderr; a traceback is our bug.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The console script."""
    try:
        import click
    except ImportError:
        sys.stderr.write("gaie-codec: the command line needs the package click: pip install gaie-codec[cli]\n")
        sys.exit(2)
    from ._commands import cli

    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"gaie-codec: {error.format_message()}", err=True)
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
