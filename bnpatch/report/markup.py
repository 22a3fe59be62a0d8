"""Make HTML and SVG; text that is not markup yet is escaped when it is inserted."""

from collections.abc import Iterable, Sequence
from html import escape

from bnpatch.core.text import visible

_VOID = {"br", "meta"}


class Markup(str):
    """Text that is markup already and must not be escaped."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """Make an element.

    Args:
        name: name of the element.
        children: content of the element; None is left out.
        attributes: ``class_`` is class, ``stroke_width`` is stroke-width; None is left out. Numbers have at
            most two decimals, which is enough for pixels.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str | None], separator: str = "") -> Markup:
    """Concatenate parts, escaped where they are not markup; None is left out."""
    return Markup(
        _escaped(separator).join(
            part if isinstance(part, Markup) else _escaped(part) for part in parts if part is not None
        )
    )


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], **attributes: str) -> Markup:
    """Make a table whose first column has the names of the rows.

    Args:
        caption: caption of the table.
        columns: heads of the columns.
        rows: cells of each row, one per column.
        attributes: attributes of the table, as of :func:`tag`.
    """
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = (
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows
    )
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", head),
        tag("tbody", *body),
        **attributes,
    )


def _escaped(text: str) -> str:
    """Text as text: no markup, and nothing that acts on a terminal or on the order of what is beside it."""
    return escape(visible(text, keep="\n"))


def _value(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
