"""``python -m bnpatch_cli``."""

from . import main

main()
