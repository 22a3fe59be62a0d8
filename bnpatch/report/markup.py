"""HTML and SVG from Python: whatever is not markup already is escaped where it is put in."""

from collections.abc import Iterable, Sequence
from html import escape

_VOID = {"br", "meta"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: what is in it; None is left out.
        attributes: ``class_`` is class, ``stroke_width`` is stroke-width; None is left out. Numbers have at
            most two decimals, which is enough for pixels.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str | None], separator: str = "") -> Markup:
    """Parts one after another, escaped where they are not markup; None is left out."""
    return Markup(
        escape(separator).join(
            part if isinstance(part, Markup) else escape(part) for part in parts if part is not None
        )
    )


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], **attributes: str) -> Markup:
    """A table whose first column names the rows.

    Args:
        caption: what it shows.
        columns: heads of the columns.
        rows: cells, one per column.
        attributes: of the table.
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


def _value(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
