"""Chunks of documents -> token ids, by several processes, in order.

`encode_chunk` is a pure function of its chunk, and results come in the order of the chunks, so
what is written does not depend on the number of processes.
"""

import collections
import contextlib
import hashlib
import multiprocessing
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from caseops import BOS, UserError
from caseops.encoder import DocumentError, Encoder
from caseops.sources import DocumentProblem

DIGEST_BYTES = 16


class Encoded(NamedTuple):
    """The documents of a chunk. `tokens` and `counts` (or None): uint16, end to end, BOS first;
    `lengths`: tokens of each; `sizes`: bytes of each text; `digests`: digest of each text."""

    tokens: np.ndarray
    counts: np.ndarray | None
    lengths: list[int]
    sizes: list[int]
    digests: list[bytes]

    def documents(self):
        """Iterate over (tokens, counts, size, digest), a document each."""
        end = 0
        for length, size, digest in zip(self.lengths, self.sizes, self.digests, strict=True):
            begin, end = end, end + length
            counts = None if self.counts is None else self.counts[begin:end]
            yield self.tokens[begin:end], counts, size, digest


def text_digest(data):
    """The digest by which equal documents are found; `data` are bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def encode_chunk(encoder, chunk):
    """Encode all documents of a chunk; byte counts for validation documents only.

    Raises DocumentProblem for the first document that cannot be encoded.
    """
    documents, problem = [], None
    try:
        for document in chunk.parse():
            documents.append(document)
    except DocumentProblem as e:
        problem = e  # unless a document before it is wrong, too
    try:
        encoded = encoder.encode_documents([d.text for d in documents], chunk.held_out)
    except DocumentError as e:
        chunk.reject(documents[e.index].line, str(e))
    if problem:
        raise problem
    starts, zero = np.array([BOS], np.uint16), np.array([0], np.uint16)
    tokens = [x for ids, _ in encoded for x in (starts, ids)]
    counts = [x for _, counted in encoded for x in (zero, counted)] if chunk.held_out else None
    return Encoded(np.concatenate([starts[:0], *tokens]),
                   np.concatenate([zero[:0], *counts]) if chunk.held_out else None,
                   [1 + len(ids) for ids, _ in encoded], [d.size for d in documents],
                   [text_digest(d.text.encode()) for d in documents])


def _work(pipe, model):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    encoder = Encoder(model, threads=1)
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        while True:
            chunk = pipe.recv()
            try:
                result = encode_chunk(encoder, chunk)
            except UserError as e:
                result = e
            except MemoryError:
                result = UserError(f"{chunk.path}: not enough memory for the documents from line "
                                   f"{chunk.first} on; use fewer --workers")
            pipe.send(result)


class Pool:
    """`n` processes that encode chunks with a tokenizer, each with a thread here that waits for it;
    a context manager that ends them.

    A process holds one chunk at a time, and at most 2n + 2 are under way, so that memory is
    bounded however slow the reader of the results is.
    """

    def __init__(self, model, n):
        context = multiprocessing.get_context("spawn")
        self.limit, self.workers, self.idle = 2 * n + 2, {}, queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(n)
        # Blocked signals stay blocked in a child: Ctrl-C cannot hit one that is still starting.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(n):
                mine, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, model), daemon=True)
                self.workers[mine] = process
                process.start()
                theirs.close()
                self.idle.put(mine)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.workers.values():
            process.terminate()
            process.join()
        self.threads.shutdown(cancel_futures=True)  # those that waited for a process do no longer
        for pipe in self.workers:
            pipe.close()

    def map(self, chunks):
        """Iterate over (chunk, Encoded) in the order of `chunks`. Raises the first UserError of
        reading or encoding in that order, or UserError for a process that died."""
        jobs, problem, chunks = collections.deque(), None, iter(chunks)
        while chunks or jobs:
            try:
                chunk = next(chunks, None) if chunks else None
            except UserError as e:
                chunk, problem = None, e  # told when those before it are
            if chunk is None:
                chunks = None
            else:
                jobs.append((chunk, self.threads.submit(self._encode, chunk)))
            while jobs and (not chunks or len(jobs) == self.limit or jobs[0][1].done()):
                chunk, job = jobs.popleft()
                yield chunk, job.result()
        if problem:
            raise problem

    def _encode(self, chunk):
        pipe = self.idle.get()
        try:
            pipe.send(chunk)
            result = pipe.recv()
        except (EOFError, OSError):
            process = self.workers[pipe]
            process.join(5)
            code = process.exitcode
            how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with code {code}"
            raise UserError(f"a worker process ended {how}; run the same command again, with "
                            "fewer --workers if memory is short") from None
        finally:
            self.idle.put(pipe)  # of a dead process, too: nobody waits for it in vain
        if isinstance(result, UserError):
            raise result
        return result


def encode_all(chunks, encoder, model, workers):
    """Iterate over (chunk, Encoded), in order. One worker is this process itself, with `encoder`;
    others make their own from `model`."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, encode_chunk(encoder, chunk)
    else:
        with Pool(model, workers) as pool:
            yield from pool.map(chunks)
