"""Lossless capitals: text with its ASCII capitals moved into four operators, and back again.

`encode` lower-cases ASCII letters and writes what it took away as private-use operators, so that
a tokenizer sees `the` for the, The and THE. `decode(encode(s)) == s` for every Python string.

    TITLE   U+E001   the next word begins with a capital
    ALLCAPS U+E002   every letter of the next word is a capital
    CAPNEXT U+E003   the next letter is a capital
    ESC     U+E004   the next character stands for itself (the text held an operator's code point)

A word is a maximal run of ASCII letters; everything else passes through and ends the word.
Operators cost no bytes of the original text; `surface_byte_counts` says how many bytes of it each
token stands for, `cumulative_bytes` is the same in closed form, vectorised.

    python lossless_caps.py encode|decode|check [FILE|-]

reads FILE or standard input as UTF-8, newline-exact. `check` proves the round trip and the byte
counts of every line and of the whole. Exit code 0, 1 (check failed) or 2 (bad input).
"""

import argparse
import functools
import os
import re
import sys

import numpy as np

TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"
TRANSFORM_NAME = "lossless_caps_caseops_v1"

# What must be rewritten: an operator, or a capital with the letters after it. One small letter
# before the capital, if there is one, says that the match begins inside a word.
_REWRITTEN = re.compile(f"[a-z]?[A-Z][A-Za-z]*|[{OPERATORS}]")
_MEMO_LONGEST = 32  # longer words are not remembered, so the memo's memory stays bounded


class LosslessCapsError(ValueError):
    """Text that no encoder wrote. `position` is the offending code point's index, from 0."""

    def __init__(self, message, position):
        super().__init__(message)
        self.position = position


# ---- encode and decode ---------------------------------------------------------------------------


def encode(text):
    """Return `text` with its ASCII capitals written as operators. Never fails, for any str."""
    return _REWRITTEN.sub(_replacement, text)


def _replacement(match):
    word = match[0]
    return _remembered(word) if len(word) <= _MEMO_LONGEST else _rewrite(word)


def _rewrite(word):
    if word in OPERATORS:
        return ESC + word
    first, rest = word[0], word[1:]
    if first.islower():  # the match began inside a word
        return first + _mark_each(rest)
    if rest and rest.isupper():
        return ALLCAPS + word.lower()
    return TITLE + first.lower() + _mark_each(rest)


def _mark_each(letters):
    return "".join(CAPNEXT + x.lower() if x.isupper() else x for x in letters)


_remembered = functools.lru_cache(maxsize=1 << 17)(_rewrite)


def decode(text):
    """Return the string that `encode` turned into `text`.

    Also takes text that `encode` would not write, where its meaning is clear (`CAPNEXT abc`).
    Raises LosslessCapsError for an operator that has nothing, or the wrong thing, to act on.
    """
    machine = _Machine()
    out = [machine.feed(x) for x in text]
    machine.finish()
    return "".join(out)


def _is_letter(x):
    return "a" <= x <= "z" or "A" <= x <= "Z"


class _Machine:
    """The decoder's state: one code point in, the original code point (or nothing) out."""

    def __init__(self):
        self.position = -1
        self.escaped = self.capital = self.in_word = self.all_caps = False
        self.word = None  # TITLE or ALLCAPS, waiting for its word

    def feed(self, x):
        self.position += 1
        if self.escaped:
            return self._literal(x)
        if x == ESC:
            self.escaped = True
            return ""
        if x in (TITLE, ALLCAPS):
            if self.word or self.in_word or self.capital:
                self._fail("a word operator that does not stand before a word")
            self.word = x
            return ""
        if x == CAPNEXT:
            if self.capital:
                self._fail("CAPNEXT twice")
            self.capital = True
            return ""
        if _is_letter(x):
            return self._letter(x)
        if self.word or self.capital:
            self._fail("an operator that no ASCII letter follows")
        self.in_word = self.all_caps = False
        return x

    def _literal(self, x):
        if self.word and not _is_letter(x):
            self._fail("a word operator before an escaped character")
        self.escaped, self.in_word = False, _is_letter(x)
        self.all_caps = self.all_caps and self.in_word
        return x

    def _letter(self, x):
        if self.in_word:
            if self.word:
                self._fail("a word operator inside a word")
            upper = self.all_caps or self.capital
        else:
            upper = bool(self.word) or self.capital
            self.all_caps = self.all_caps or self.word == ALLCAPS
            self.word, self.in_word = None, True
        self.capital = False
        return x.upper() if upper else x

    def finish(self):
        if self.escaped or self.word or self.capital:
            self._fail("the text ends after an operator")

    def _fail(self, what):
        raise LosslessCapsError(f"{what}, at character {self.position}", self.position)


# ---- byte attribution ----------------------------------------------------------------------------


def surface_byte_counts(surfaces):
    """Original UTF-8 bytes that each surface stands for.

    `surfaces` are consecutive slices of one encoded text, in order, such as the stretches that
    its tokens cover. Returns a list of as many ints. The decoder's state runs across the borders.
    Raises LosslessCapsError as `decode` does. This is the definition; `cumulative_bytes` is fast.
    """
    machine = _Machine()
    counts = [sum(len(machine.feed(x).encode()) for x in surface) for surface in surfaces]
    machine.finish()
    return counts


def cumulative_bytes(data):
    """C[0..len(data)] int64: original bytes before each byte offset of an encoded text.

    `data` is the UTF-8 of what `encode` returned; the slice data[a:b] stands for C[b] - C[a]
    original bytes. Every byte weighs 1, the three of a live operator 0: a letter is one byte in
    either case, and whether an operator is live depends only on the ESC before it.
    """
    raw = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(raw[:-2] == 0xEE)  # the lead byte of U+E000..U+EFFF
    at = at[(raw[at + 1] == 0x80) & (raw[at + 2] >= 0x81) & (raw[at + 2] <= 0x84)]
    live = np.ones(len(at), bool)
    for i in np.flatnonzero(raw[at + 2] == 0x84):  # rare: text that held an operator itself
        if live[i] and i + 1 < len(at) and at[i + 1] == at[i] + 3:
            live[i + 1] = False
    weight = np.ones(len(raw) + 1, np.int64)
    weight[0] = 0
    for k in (1, 2, 3):
        weight[at[live] + k] = 0
    return np.cumsum(weight)


# ---- command line --------------------------------------------------------------------------------


def check(text):
    """The first reason (str) why encoding `text` is not exact, or None: round trip, byte counts."""
    encoded = encode(text)
    if decode(encoded) != text:
        return "decode(encode(text)) is not the text"
    data, counts = encoded.encode(), surface_byte_counts(encoded)
    ends = np.cumsum([0] + [len(x.encode()) for x in encoded])
    if np.diff(cumulative_bytes(data)[ends]).tolist() != counts:
        return "the closed form of the byte counts differs from its definition"
    if sum(counts) != len(text.encode()):
        return "the byte counts do not add up to the text's bytes"
    return None


class _InputError(Exception):
    """One line for the user: file, place, remedy."""


def _read(name):
    if name == "-":
        data, name = sys.stdin.buffer.read(), "standard input"
    else:
        with open(name, "rb") as f:
            data = f.read()
    try:
        return name, data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise _InputError(f"{name}:{line}: not UTF-8 (byte {e.start} of the file); "
                        "convert the file to UTF-8 first") from None


def _run(command, name):
    name, text = _read(name)
    if command == "check":
        lines = re.findall(r"[^\n]*\n|[^\n]+", text)
        for number, line in enumerate(lines, 1):
            if reason := check(line):
                print(f"{name}:{number}: {reason}")
                return 1
        if reason := check(text):
            print(f"{name}: whole text: {reason}")
            return 1
        print(f"{name}: {len(lines):,} lines, {len(text.encode()):,} bytes: "
              "round trip and byte counts are exact")
        return 0
    try:
        result = encode(text) if command == "encode" else decode(text)
    except LosslessCapsError as e:
        line = text.count("\n", 0, e.position) + 1
        raise _InputError(f"{name}:{line}: {e}; decode takes only what encode wrote") from None
    sys.stdout.buffer.write(result.encode())
    sys.stdout.buffer.flush()
    return 0


def main(argv=None):
    """Command line: returns the exit code (0 well, 1 check failed, 2 bad input, 130
    Ctrl-C)."""
    parser = argparse.ArgumentParser(
        prog="lossless_caps.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["encode", "decode", "check"])
    parser.add_argument("file", nargs="?", default="-", help="UTF-8 text; - is standard input")
    args = parser.parse_args(argv)
    try:
        return _run(args.command, args.file)
    except _InputError as e:
        print(f"error: {e}", file=sys.stderr)
    except BrokenPipeError:  # the reader went away (| head): not worth a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as e:
        print(f"error: {e.filename or 'output'}: {e.strerror}; check the name, the rights and "
              "the free space", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
