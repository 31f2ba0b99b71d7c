"""lossless_caps.py: the specification's examples, round trips, byte counts, the command line."""

import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lossless_caps as caps  # noqa: E402
from lossless_caps import ALLCAPS, CAPNEXT, ESC, TITLE  # noqa: E402
from tests.plain_caseops import plain_transform  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "caseops.jsonl"


def spelled(text):
    """T A C E, between angle brackets, -> the operators."""
    return re.sub("<([TACE])>", lambda m: caps.OPERATORS["TACE".index(m[1])], text)


EXAMPLES = [
    ("", ""), ("hello world", "hello world"), ("The NASA Launch", "<T>the <A>nasa <T>launch"),
    ("A", "<T>a"), ("OK", "<A>ok"), ("Ok", "<T>ok"), ("oK", "o<C>k"), ("aB", "a<C>b"),
    ("iPhone", "i<C>phone"), ("OpenAI", "<T>open<C>a<C>i"), ("McDonald", "<T>mc<C>donald"),
    ("ABc", "<T>a<C>bc"), ("USAs", "<T>u<C>s<C>as"), ("HTTPServer", "<T>h<C>t<C>t<C>p<C>server"),
    ("XMLHttpRequest", "<T>x<C>m<C>l<C>http<C>request"),
    ("McDONALD", "<T>mc<C>d<C>o<C>n<C>a<C>l<C>d"), ("don't", "don't"), ("DON'T", "<A>don'<T>t"),
    ("O'Neil", "<T>o'<T>neil"), ("U.S.A.", "<T>u.<T>s.<T>a."), ("R2D2", "<T>r2<T>d2"),
    ("SCREAMING_SNAKE", "<A>screaming_<A>snake"), ("camelCase", "camel<C>case"),
    ("CAFÉ", "<A>cafÉ"), ("ÉCLAIR", "É<A>clair"), ("Straße", "<T>straße"), ("ẞA", "ẞ<T>a"),
    ("İstanbul", "İstanbul"), ("ıI", "ı<T>i"), ("ǅungla", "ǅungla"), ("A\u0301", "<T>a\u0301"),
    ("\uff21bc", "\uff21bc"), ("\u212aelvin", "\u212aelvin"), ("\ue000X", "\ue000<T>x"),
    (TITLE, "<E><T>"), (ESC, "<E><E>"), (ESC + ESC, "<E><E><E><E>"), (TITLE + "A", "<E><T><T>a"),
    ("A" + TITLE + "b", "<T>a<E><T>b"), ("aB" + CAPNEXT + "cD", "a<C>b<E><C>c<C>d"),
    ("AB" + ALLCAPS + "CD", "<A>ab<E><A><A>cd"), ("a\0B", "a\0<T>b"), ("a\ud800B", "a\ud800<T>b"),
    ("\ue005Z", "\ue005<T>z"),
]


@pytest.mark.parametrize(("text", "encoded"), EXAMPLES)
def test_examples(text, encoded):
    assert caps.encode(text) == spelled(encoded)
    assert caps.decode(spelled(encoded)) == text


@pytest.mark.parametrize(("encoded", "text"), [
    ("<C>abc", "Abc"), ("<T><C>a", "A"), ("<A><C>ab", "AB"), ("<A>a<C>b", "AB"), ("<A>a", "A"),
    ("<T>Abc", "Abc"), ("ABC", "ABC"), ("<E>a", "a"), ("a<E>b", "ab"), ("<E>\n", "\n"),
    ("<C><E><T>a", TITLE + "A"), ("<A>ab1cd", "AB1cd"), ("<A>a<E>b", "Ab"),
])
def test_decoder_takes_what_the_encoder_would_not_write(encoded, text):
    assert caps.decode(spelled(encoded)) == text
    counts = caps.surface_byte_counts(list(spelled(encoded)))
    assert sum(counts) == len(text.encode())


@pytest.mark.parametrize(("encoded", "position"), [
    ("<T><E>ab", 3), ("<C><T>a", 1), ("a<T>b", 1), ("<T><T>a", 1), ("<T><A>a", 1), ("<C><C>a", 1),
    ("<T>1", 1), ("<T>é", 1), ("<A>ab<C>1", 4), ("<C><E><T>.", 3), ("<T><E>.", 2), ("a<A>", 1),
    ("<T>", 0), ("x <A>", 2), ("<C>", 0), ("<E>", 0),
])
def test_decoder_refuses(encoded, position):
    with pytest.raises(caps.LosslessCapsError) as e:
        caps.decode(spelled(encoded))
    assert isinstance(e.value, ValueError)
    assert e.value.position == position
    with pytest.raises(caps.LosslessCapsError):
        caps.surface_byte_counts(list(spelled(encoded)))


# ---- fuzz against the plain twin -----------------------------------------------------------------


NASTY = [*"aAbBzZ mM\n\t\0'_09-", *caps.OPERATORS, "\ue000", "\ue005", "é", "\u0301", "İ", "ß", "ẞ",
         "ſ", "K", "ǅ", "\ufb01", "\uff21", "😀", "\u2581", "\u200d", "\ufeff", "\U0010ffff",
         "The", "USA", "\r\n"]
texts = st.one_of(st.text(), st.lists(st.sampled_from(NASTY)).map("".join))


def check_against_twins(text):
    encoded = caps.encode(text)
    assert encoded == plain_transform(text)
    assert caps.decode(encoded) == text
    assert caps.check(text) is None


@settings(max_examples=500, deadline=None)
@given(texts)
def test_fuzz(text):
    check_against_twins(text)


def test_fuzz_seeded():
    random_ = random.Random(5)
    for _ in range(5000):
        check_against_twins("".join(random_.choices(NASTY, k=random_.randrange(30))))


def test_lone_surrogates_survive():
    for text in ("\ud800", "A\udfffB", "\ud800\udc00X", "Ab\udbff"):
        assert caps.encode(text) == plain_transform(text)
        assert caps.decode(caps.encode(text)) == text


def test_memo_does_not_hold_long_words():
    word = "Ab" * 50_000
    assert caps.decode(caps.encode(word)) == word
    assert caps._remembered.cache_info().maxsize is not None


# ---- byte attribution ----------------------------------------------------------------------------


def test_surface_counts_follow_the_pieces():
    def counts(*surfaces):
        return caps.surface_byte_counts([spelled(s) for s in surfaces])
    assert counts("<T>", "the", " ", "<A>", "nas", "a", " ", "<T>", "la", "unch") \
        == [0, 3, 1, 0, 3, 1, 1, 0, 2, 4]
    assert counts("<E>", "<T>") == [0, 3]  # a literal operator of the text
    assert counts("", "", "é", "", "", "", "😀") == [0, 0, 2, 0, 0, 0, 4]
    assert counts("a", " \n b") == [1, 4]
    assert counts() == []


@settings(max_examples=300, deadline=None)
@given(texts, st.randoms())
def test_closed_form_equals_state_machine(text, random_):
    encoded = caps.encode(text)
    cuts = sorted(random_.randrange(len(encoded) + 1) for _ in range(random_.randrange(6)))
    cuts = [0, *cuts, len(encoded)]
    surfaces = [encoded[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    total = caps.cumulative_bytes(encoded.encode())
    ends = np.cumsum([0] + [len(s.encode()) for s in surfaces])
    assert np.diff(total[ends]).tolist() == caps.surface_byte_counts(surfaces)
    assert total[-1] == len(text.encode())


def test_golden_vectors():
    if not GOLDEN.exists():
        pytest.skip(f"no golden file at {GOLDEN}")
    with open(GOLDEN, encoding="utf-8") as f:
        for line in f:
            v = json.loads(line)
            assert caps.encode(v["input"]) == v["transformed"], v["id"]
            assert caps.decode(v["transformed"]) == v["input"], v["id"]
            if v["surfaces"] is not None:
                assert caps.surface_byte_counts(v["surfaces"]) == v["byte_counts"], v["id"]


# ---- command line --------------------------------------------------------------------------------


def cli(*args, stdin=b""):
    return subprocess.run([sys.executable, str(ROOT / "lossless_caps.py"), *map(str, args)],
                          input=stdin, capture_output=True, timeout=60, check=False)


TEXT = "The NASA Launch\r\n\n\ttab \ue001 é\u2028x\x0c\rno newline at the END".encode()


def test_cli_round_trip_is_newline_exact(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    encoded = cli("encode", tmp_path / "a.txt")
    assert (encoded.returncode, encoded.stderr) == (0, b"")
    assert encoded.stdout.decode() == caps.encode(TEXT.decode())
    assert cli("decode", stdin=encoded.stdout).stdout == TEXT
    assert cli("decode", "-", stdin=encoded.stdout).stdout == TEXT
    assert cli("encode", stdin=b"").stdout == b""
    checked = cli("check", tmp_path / "a.txt")
    assert checked.returncode == 0
    assert checked.stdout.decode().count("\n") == 1
    assert f"3 lines, {len(TEXT)} bytes" in checked.stdout.decode()


@pytest.mark.parametrize(("args", "stdin", "said"), [
    (["encode"], b"ok\nbad \xff\n", "standard input:2: not UTF-8 (byte 7"),
    (["check"], b"\xe2\x96", "standard input:1: not UTF-8"),
    (["decode"], "ok\n\ue001.".encode(), "standard input:2: an operator that no"),
    (["encode", "no/such/file"], b"", "no/such/file: No such file"),
    (["encode", "."], b"", ".: Is a directory"),
])
def test_cli_bad_input_is_one_line(args, stdin, said):
    done = cli(*args, stdin=stdin)
    message = done.stderr.decode()
    assert done.returncode == 2
    assert message.startswith("error: ")
    assert said in message
    assert message.count("\n") == 1
    assert done.stdout == b""


def test_cli_wrong_command():
    assert cli("compress").returncode == 2


def test_cli_check_reports_a_mismatch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fine\nBroken\n")))
    monkeypatch.setattr(caps, "encode", str.lower)
    assert caps.main(["check"]) == 1
    assert capsys.readouterr().out == "standard input:2: decode(encode(text)) is not the text\n"
