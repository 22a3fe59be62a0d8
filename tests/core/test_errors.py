import pytest

from bnpatch.core.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (KeyError(101), "KeyError"),
        (ValueError("word " * 100), "word " * 59 + "word ..."),
        (OSError("cannot open " + "/a" * 200), "cannot open " + "/a" * 144 + " ..."),
    ],
)
def test_the_first_line_of_an_error_says_something(error, line):
    assert first_line(error) == line
