"""A result at a glance: whatever it says, and however wide the terminal is."""

import shlex
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from vitreg.printing import Step, Summary, did_you_mean, one_of, shell_lines, text_table, wrapped
from vitreg.printing.words import in_brief

WIDTHS = st.integers(30, 140)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TYPED = st.text(string.ascii_letters + string.digits + " /._-'\"$日本", min_size=1, max_size=40)


VERDICTS = st.sampled_from(["artifacts, severe", "no artifacts", "the fix helps"])
ROWS = st.lists(st.tuples(WORDS, WORDS), max_size=4)
SEVERAL = st.lists(WORDS, max_size=3)


@given(VERDICTS, WORDS, ROWS, SEVERAL, SEVERAL, WIDTHS)
def test_no_line_is_wider_than_the_terminal_and_the_verdict_comes_first(
    verdict, subject, rows, notes, steps, width
):
    summary = Summary(verdict, subject, rows, notes=notes, steps=[Step(words) for words in steps])
    lines = summary.text(width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert lines[0].startswith(verdict[0].upper() + verdict[1:] + ":")
    assert all(line.isprintable() for line in lines)


@given(st.lists(TYPED, min_size=1, max_size=8), WIDTHS)
def test_a_command_can_be_copied_and_only_a_word_is_wider(words, width):
    lines = shell_lines(words, width)
    assert shlex.split("\n".join(lines).replace(" \\\n", " ")) == words
    for line in lines:
        quoted = shlex.join(words)
        assert cell_len(line) <= width or line.removesuffix(" \\").strip() in quoted
        options = [word for word in shlex.split(line.removesuffix("\\")) if word.startswith("-")]
        assert cell_len(line) <= width or len(shlex.split(line.removesuffix("\\"))) <= 2 + len(options)


def test_an_option_stays_with_its_value():
    command = ("vitreg", "fix", "timm:vit_tiny_patch16_224", "photos", "-o", "fix/", "--limit", "20")
    assert shell_lines(command, 40) == [
        "vitreg fix timm:vit_tiny_patch16_224 \\",
        "  photos -o fix/ --limit 20",
    ]
    assert shell_lines(command, 26)[-1] == "  --limit 20"


@given(WORDS, WIDTHS)
def test_wrapped_words_lose_no_letter(text, width):
    lines = wrapped(text, width, "  ")
    assert max(map(cell_len, lines), default=0) <= width
    printed = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    assert "".join("".join(lines).split()) == "".join(printed.split())


def test_columns_of_the_environment_are_heeded_and_a_pipe_has_80(monkeypatch):
    long = Summary("no artifacts", "m", notes=["word " * 60])
    monkeypatch.delenv("COLUMNS", raising=False)
    assert 70 < max(map(len, long.text().splitlines())) <= 80
    for columns, least, most in ((60, 50, 60), (100, 90, 100), (200, 90, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert least < max(map(len, long.text().splitlines())) <= most


@pytest.mark.parametrize(
    ("text", "brief"),
    [
        ("it helps (2.0% -> 0.0%); and so on", "it helps."),
        ("a first sentence. A second one.", "a first sentence."),
        ("one at 5.5 of 6: more", "one at 5.5 of 6."),
        ("whole", "whole."),
    ],
)
def test_a_long_text_in_brief(text, brief):
    assert in_brief(text) == brief


# -- did you mean -------------------------------------------------------------------------------------

NAMES = ["registers", "splitting", "shift-average", "knn", "discovery", "vit_tiny_patch16_224"]


@given(st.sampled_from(NAMES), st.data())
def test_one_wrong_letter_is_understood(name, data):
    """A letter left out, doubled, exchanged with the next, or of the other case."""
    at = data.draw(st.integers(0, len(name) - 2))
    typo = data.draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + name[at] + name[at:],
                name[:at] + name[at + 1] + name[at] + name[at + 2 :],
                name.upper(),
            ]
        )
    )
    assert did_you_mean(typo, NAMES) == f" Did you mean {name}?"
    assert one_of(typo, NAMES).startswith(f"Did you mean {name}? Expected one of registers, ")


@given(st.text(string.digits, min_size=5))
def test_what_is_like_nothing_gets_no_suggestion(name):
    assert did_you_mean(name, ["registers", "splitting"]) == ""


def test_several_suggestions_with_what_stands_before_them():
    assert (
        did_you_mean("vit_b", ["vit_a", "vit_c", "swin"], 2, "timm:")
        == " Did you mean timm:vit_c or timm:vit_a?"
    )


def test_cells_of_a_table_are_wrapped():
    table = text_table([["a long name of a model", "1"]], left=1, width=16)
    assert max(map(len, table.splitlines())) <= 16
