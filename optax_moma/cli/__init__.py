"""The command line, ``optax-moma``: see its ``--help``."""

import sys

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ModuleNotFoundError as missing:
    print(f"{missing}: the command line needs pip install 'optax-moma[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from ._commands import app

__all__ = ["app"]
