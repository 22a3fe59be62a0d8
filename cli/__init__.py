"""The command line of bnpatch: parse, call one verb, print."""


def main() -> None:
    """Run the command line and exit with its code."""
    from .app import run

    run()
