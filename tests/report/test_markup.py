import pytest

from bnpatch.report.markup import Markup, join, table, tag
from tests.report.html_page import Page


def test_what_is_not_markup_is_escaped():
    assert tag("p", "a < b & c", Markup("<br>")) == "<p>a &lt; b &amp; c<br></p>"
    assert tag("p", title='"><script>') == '<p title="&quot;&gt;&lt;script&gt;"></p>'
    assert join(["<", None, tag("b", "x")], "&") == "&lt;&amp;<b>x</b>"


def test_attributes_are_named_as_in_html():
    assert tag("path", class_="a", stroke_width=1.0, viewBox="0 0 1 1", rx=None) == (
        '<path class="a" stroke-width="1" viewBox="0 0 1 1"></path>'
    )
    assert tag("meta", name="x") == '<meta name="x">'


@pytest.mark.parametrize(("number", "text"), [(1.005, "1"), (0.126, "0.13"), (100.0, "100"), (7, "7")])
def test_numbers_are_short(number, text):
    assert tag("g", x=number) == f'<g x="{text}"></g>'


def test_a_table_has_heads_both_ways():
    page = Page(table("of <fruit>", ["kind", "price"], [["<apple>", "1"], ["pear", "2"]]))
    assert page.tables == [[["kind", "price"], ["<apple>", "1"], ["pear", "2"]]]
    assert [a for a in page.attributes if a[0] == "th"] == [
        ("th", "scope", s) for s in ("col", "col", "row", "row")
    ]
    assert page.text.startswith("of <fruit>")
