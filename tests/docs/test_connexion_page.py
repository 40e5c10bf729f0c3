"""The page on Connexion shows changes to files: the new side is the file as it is, the old side is Python."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.pages import ROOT, Block, blocks

PAGE = ROOT / "docs" / "connexion.md"
HEAD = re.compile(r"--- (?P<old>\S+)\n\+\+\+ (?P<new>\S+)\n")
DIFFS = [block for block in blocks(PAGE) if block.language == "diff"]


def name_of(block: Block) -> str:
    """Which file becomes which."""
    head = HEAD.match(block.text)
    assert head
    return f"{head['old']} to {head['new']}"


def side(block: Block, marks: str) -> str:
    lines = HEAD.sub("", block.text).splitlines()
    return "".join(line[1:] + "\n" for line in lines if line[0] in marks)


def without_docstring(name: str) -> str:
    """A file of the bank from its first import on; `from __future__` goes without saying."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text.partition("from __future__ import annotations\n\n")[2]


@pytest.mark.parametrize("block", DIFFS, ids=name_of)
def test_the_page_shows_the_files_as_they_are(block):
    head = HEAD.match(block.text)
    assert head
    assert side(block, " +") == without_docstring(head["new"])
    if head["old"].startswith("examples/"):
        assert side(block, " -") == without_docstring(head["old"])


@pytest.mark.parametrize("block", DIFFS, ids=name_of)
def test_what_was_before_is_python_and_not_ours(block):
    old = side(block, " -")
    ast.parse(old)
    assert "penstock" not in old.lower() or "examples/" in name_of(block).partition(" to ")[0]


def test_on_connexion_2_no_line_changes_that_is_not_the_pools():
    connexions = re.compile(
        r"connexion|CORS|json_encoder|add_api|\.run\(|def get_|select|from bank\.models"
    )
    for block in DIFFS[:2]:
        assert connexions.search(side(block, " "))
        assert not connexions.search(side(block, "+-"))
