"""Data files that are odd or hostile: refused with one message, without a hang, without much memory, and nothing of theirs steers the
terminal."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from spilt.errors import printable


@given(st.text(st.characters()))
def test_printable_text_has_no_character_that_steers_a_terminal(text):
    for shown in (printable(text), printable(text, lines=True).replace("\n", "")):
        # control, surrogate, line and paragraph separator: Unicode's own classes
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
        assert not [c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")]
    assert printable(printable(text)) == printable(text)


def test_printable_keeps_text_and_shows_escapes():
    assert printable("wörter, 日本 👩‍👩‍👧 \\x1b") == "wörter, 日本 👩‍👩‍👧 \\x1b"
    assert printable("a\x1b[2J\nb\tc\x9b\u202e\x7f\ud83d") == r"a\x1b[2J\nb\tc\x9b\u202e\x7f\ud83d"
    assert printable("a\nerror: b\n  c\r\n", lines=True) == "a\n  error: b\n  c\\r\n"
