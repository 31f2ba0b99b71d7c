"""Time text -> ids and byte counts on one core, against a plain per-document reference.

    python bench/bench_prepare.py --docs docs.jsonl --sp TOKENIZER.model

The documents are held out: before the timed ones the encoder meets `--prime` MB of other documents
of the file, as in any run after its first seconds; "cold" is the very first part of those. The
reference works as the record lineage does, a document at a time: transform word by word, encode;
and for validation documents encode again for the surfaces and count their bytes character by
character. Every figure is the median over `--repeats` parts of the held-out documents, fast and
reference alternating, with the spread; what they return is compared. MB: 10^6 bytes of UTF-8.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from caseops.encoder import Encoder  # noqa: E402
from caseops.processors import processors  # noqa: E402
from caseops.sources import Document, batches  # noqa: E402
from tests.plain_caseops import plain_counts, plain_ids  # noqa: E402


def read(path, megabytes):
    """Documents of a JSON-lines file, `megabytes` of text."""
    documents, size = [], 0
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            text = json.loads(line)["text"]
            documents.append(Document(text, len(text.encode()), number))
            size += documents[-1].size
            if size >= megabytes * 1e6:
                return documents
    raise SystemExit(f"error: {path} has {size / 1e6:.0f} MB; give less --prime")


def split(documents, megabytes):
    """(documents of about `megabytes`, the rest)."""
    size = 0
    for i, document in enumerate(documents):
        if size >= megabytes * 1e6:
            return documents[:i], documents[i:]
        size += document.size
    return documents, []


def fast(encoder, documents, counts=True):
    """(MB/s, [(ids, counts)]) of the encoder, batch by batch."""
    started, found = time.perf_counter(), []
    for batch in batches(documents, 1 << 20, lambda d: d.size):
        found += encoder.encode_documents([d.text for d in batch], counts)
    return rate(documents, started), found


def plain(sp, documents, counts):
    """(MB/s, [(ids, counts)]) of the reference; without `counts`, ids only."""
    started, found = time.perf_counter(), []
    for document in documents:
        ids = plain_ids(sp, document.text)
        found.append((ids, plain_counts(sp, document.text) if counts else None))
    return rate(documents, started), found


def rate(documents, started):
    return sum(d.size for d in documents) / (time.perf_counter() - started) / 1e6


def same(found, expected):
    return all(ids.tolist() == plain_ids and counts.tolist() == plain_counts for
               (ids, counts), (plain_ids, plain_counts) in zip(found, expected, strict=True))


def show(name, values):
    spread = max(values) - min(values)
    print(f"{name:46} {statistics.median(values):7.2f} MB/s (+-{spread / 2:.2f})", flush=True)
    return statistics.median(values)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--docs", required=True, help="JSON lines, at least --prime + 40 MB")
    p.add_argument("--sp", required=True, help="SentencePiece model")
    p.add_argument("--prime", type=float, default=100, help="MB met before (default %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="parts timed (default %(default)s)")
    args = p.parse_args()
    print(f"{platform.machine()}, {processors()} cores, one used; Python "
          f"{platform.python_version()}, sentencepiece {sentencepiece.__version__}")
    documents = read(args.docs, args.prime + 7 * args.repeats)
    primer, held_out = split(documents, args.prime)
    encoder = Encoder(Path(args.sp).read_bytes(), args.sp)
    print(f"fast path: {'segment cache' if encoder.cache else 'none, ' + encoder.cache_reason}")
    cold, primer = split(primer, 7)
    fast(Encoder(Path(args.sp).read_bytes(), args.sp), cold)  # compiles
    show("cold, first 7 MB, ids and counts", [fast(encoder, cold)[0]])
    show(f"while meeting {args.prime:.0f} MB", [fast(encoder, primer)[0]])
    rates = {"ids and counts": [], "train reference (ids)": [], "val reference (ids, counts)": []}
    equal = True
    for _ in range(args.repeats):
        reference, held_out = split(held_out, 1.5)
        part, held_out = split(held_out, 5)
        train_rate, _ = plain(encoder.sp, reference, counts=False)
        val_rate, expected = plain(encoder.sp, reference, counts=True)
        fast_rate, _ = fast(encoder, part)
        for name, value in zip(rates, (fast_rate, train_rate, val_rate), strict=True):
            rates[name].append(value)
        equal &= same(encoder.encode_documents([d.text for d in reference]), expected)
    print("held out:")
    ours, train, val = (show("  " + name, values) for name, values in rates.items())
    print(f"{ours / train:.1f} times the train reference, {ours / val:.1f} times the val "
          f"reference; ids and counts {'equal' if equal else 'DIFFER'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
