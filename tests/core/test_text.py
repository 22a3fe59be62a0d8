"""Texts that reach a terminal: without passwords, and without what acts on it."""

import pytest

from bnpatch.core.text import masked, visible


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("postgresql://me:se/c:r@t@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg2://:secret@host:5432/db", "postgresql+psycopg2://:***@host:5432/db"),
        ("mysql://host/db?user=me&password=secret&x=1", "mysql://host/db?user=me&password=***&x=1"),
        ("postgres:/me:secret@host/db", "postgres:/me:***@host/db"),
        ("me:secret@host/db", "me:***@host/db"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
        ("x.db", "x.db"),
    ],
)
def test_passwords_of_databases_are_masked(place, shown):
    assert masked(place) == shown
    assert masked(place, f"no {place} here") == f"no {shown} here"
    assert masked("a://b:se%40cret@c", "at se@cret and se%40cret") == "at *** and ***"


ODD = "a\x1b[31m\u202eb"  # red from here on, and backwards


ESCAPED = r"a\x1b[31m\u202eb"


def test_what_acts_on_a_terminal_is_escaped():
    assert visible(ODD) == ESCAPED
    assert visible("a\nb\x9b\u2028\udce4\u2067", keep="\n") == r"a" + "\n" + r"b\x9b\u2028\udce4\u2067"
    assert visible("grün 猫 naïve\\x") == "grün 猫 naïve\\x"
