"""The check of the built site: a link that leads nowhere, and what comes from a network, are named."""

import runpy
from pathlib import Path

CHECK = runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "_ext" / "check_site.py"))


def test_a_site_whose_links_hold_has_no_problem(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b%20c.html#there">x</a><a href="https://else.where">y</a>')
    (tmp_path / "b c.html").write_text('<h2 id="there">there</h2><img src="a.html">')
    assert CHECK["problems"](tmp_path) == []


def test_what_is_wrong_is_named(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="lost.html">x</a><a href="#lost">y</a><script src="https://cdn/x.js"></script>'
    )
    assert CHECK["problems"](tmp_path) == [
        "a.html: loads https://cdn/x.js",
        "a.html: lost.html",
        "a.html: #lost",
    ]
