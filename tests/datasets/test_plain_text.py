"""HTML to words, whatever is thrown at it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_em3.datasets.plain_text import plain_text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("Plain words", "Plain words"),
        ("  two \n\t lines\x00 ", "two lines"),
        ("<p>One</p><p>Two</p>", "One Two"),
        ("a<br/>b", "a b"),
        ("<b>bold</b>, H<span>2</span>O", "bold, H2O"),
        ("Tom &amp; Jerry&#39;s &quot;best&quot;", 'Tom & Jerry\'s "best"'),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("AT&T, R&D", "AT&T, R&D"),
        ("width < 6 in & height > 3", "width < 6 in & height > 3"),
        ("<style>p {color: red}</style>Seen<script>if (a < b) {alert('x')}</script> and heard", "Seen and heard"),
        ("<a href='x' onclick=\"y('>')\">link</a>", "link"),
        ("<!-- a comment -->after", "after"),
        ("</span></span></span>", ""),
        ("Gift card <![new]!> &lt;![CDATA[x]&gt;", "Gift card <![new]!> <![CDATA[x]>"),
        ("cut off \ud83d", "cut off ?"),
        ("Caf\u00e9 &eacute;t\u00e9", "Caf\u00e9 \u00e9t\u00e9"),
    ],
)
def test_what_a_reader_would_see(markup: str, text: str) -> None:
    assert plain_text(markup) == text


@given(st.text(alphabet=st.sampled_from("ab <>&;/\"'=!-#x1\n"), max_size=200))
def test_any_input_gives_single_spaced_text(markup: str) -> None:
    text = plain_text(markup)
    assert text == " ".join(text.split())


@given(st.text(alphabet=st.characters(exclude_characters="<&", exclude_categories=["Cs"]), max_size=100))
def test_text_without_markup_keeps_its_words(markup: str) -> None:
    assert plain_text(markup).split() == markup.translate({**dict.fromkeys(range(32), " "), 127: " "}).split()


@pytest.mark.parametrize("piece", ["<a ", "<a b='", "<a b='>", "<!--", "&#", "<script>", "</"])
def test_hostile_markup_is_read_only_so_far(piece: str) -> None:
    assert len(plain_text(piece * 1_000_000)) <= 10_000
    assert plain_text("x" * 50_000) == "x" * 10_000
