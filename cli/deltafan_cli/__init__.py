"""deltafan_cli: the `deltafan` command."""

import sys


def main() -> None:
    """Run the command line; without its extra, say how to get it."""
    try:
        from deltafan_cli._app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit("The command line needs its extra: pip install 'deltafan[cli]'")
    except KeyboardInterrupt:  # most of a short command's time is its imports
        sys.exit(130)
    run()
