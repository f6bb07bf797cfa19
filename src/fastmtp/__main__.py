"""Where the `fastmtp` command begins."""

from __future__ import annotations

import sys


def main() -> None:
    """Ctrl-C is a line from the first moment on: importing the commands takes a while."""
    try:
        from fastmtp.cli.main import main as run
    except KeyboardInterrupt:
        print("\nfastmtp: stopped; nothing was begun", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
