"""Make text from files, models and databases safe to print."""

import re
import unicodedata
from urllib.parse import unquote

# Unicode categories of control characters, surrogates and line separators.
_CONTROL = {"Cc", "Cs", "Zl", "Zp"}
# Characters that change the writing direction of the text beside them.
_DIRECTION = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MASK = "***"


def visible(text: str, keep: str = "") -> str:
    r"""Escape characters that would control a terminal or reorder the text, as ``\x1b`` or ``\u202e``.

    Args:
        text: any text, such as a message with names of files, classes and models.
        keep: characters that are not escaped.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _is_control(c) else _escaped(c) for c in text)


def _is_control(character: str) -> bool:
    return character in _DIRECTION or unicodedata.category(character) in _CONTROL


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


# A password stands between the name of the user and the last @, or is the value of a parameter of the query.
_PASSWORDS = (
    re.compile(r"^((?:[\w+.-]+:/{0,2})?[^:/@]*:(?!//))(.+)(?=@)", re.DOTALL),
    re.compile(r"([?&][^=&]*(?:passw|pwd|secret|token|odbc_connect)[^=&]*=)([^&]+)", re.IGNORECASE),
)


def counted(count: int, noun: str) -> str:
    """Say how many there are of something, in the singular where there is one.

    >>> counted(1, "class folder"), counted(2000, "class")
    ('1 class folder', '2,000 classes')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def masked(place: str, said: str | None = None) -> str:
    """Hide the password in the address of a database.

    Args:
        place: an address such as ``postgresql://user:password@host/name``; other text stays as it is.
        said: a message that may contain the address or the password; it is returned instead, masked.
    """
    hidden = place
    secrets: list[str] = []
    for pattern in _PASSWORDS:
        secrets += (found[2] for found in pattern.finditer(hidden))
        hidden = pattern.sub(rf"\g<1>{_MASK}", hidden)
    if said is None:
        return hidden
    said = said.replace(place, hidden)
    for secret in (*secrets, *map(unquote, secrets)):
        said = said.replace(secret, _MASK)
    return said
