"""Reads a page of HTML strictly, for tests of what stands in it."""

from html.parser import HTMLParser

_VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Tables, headings and text of a page.

    Attributes:
        tables: rows of cells, of each table.
        headings: texts of h1 to h3.
        attributes: names and values of all attributes, by tag.
        tags: every tag that was opened.
    """

    def __init__(self, text):
        super().__init__()
        self.tables, self.headings, self.attributes, self.tags = [], [], [], []
        self._open, self._words = [], []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    @property
    def text(self):
        return " ".join(" ".join(self._words).split())

    def row(self, first):
        """The cells of the row whose first cell begins so."""
        return next(row for table in self.tables for row in table if row[0].startswith(first))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self._words.append(data)
        if {"th", "td"} & set(self._open):
            row = self.tables[-1][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())
        if {"h1", "h2", "h3"} & set(self._open):
            self.headings[-1] += data
