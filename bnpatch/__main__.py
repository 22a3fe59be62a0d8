"""``python -m bnpatch`` is ``bnpatch``; the command line stands above this package, so it is not imported."""

from runpy import run_module

if __name__ == "__main__":
    run_module("bnpatch_cli", run_name="__main__", alter_sys=True)
