"""Text from an artifact: `python train_gpt.py sample "Once upon"`.

The artifact and the settings are those of --folder (ARTIFACT_DIR, else the current folder), the
tokenizer is TOKENIZER_PATH, else the one beside the data. Plain decoding: one token after another,
from the softmax of the logits over a temperature, cut to the likeliest tokens that hold --top-p of
the probability. No test-time training, no n-grams. On a GPU where there is one, else on the CPU.
The text ends with the document (BOS) or after --tokens."""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import finished
import train_gpt as t


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line; UserError for what is out of range."""
    parser = argparse.ArgumentParser(prog="train_gpt.py sample", allow_abbrev=False,
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="", help="how the text begins")
    parser.add_argument("--folder", type=Path, help="where final_model.int6.ptz lies")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, help="1: all tokens")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many new ones")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice")
    told = parser.parse_args(given)
    t.require(0 <= told.temperature < float("inf"), "--temperature must be at least 0")
    t.require(0 < told.top_p <= 1, "--top-p must be above 0 and at most 1")
    t.require(told.tokens > 0, "--tokens must be at least 1")
    t.require(0 <= told.seed < 2**63, "--seed must be a whole number from 0 on")
    return told


def load(cfg: t.Config, folder: Path, rt: t.Runtime) -> t.GPT:
    """The model of the artifact in `folder`, for `forwards`."""
    path = finished.artifact_of(folder)
    model = t.GPT(cfg, t.attend_sdpa, rt.dtype).to(rt.device)
    arrays, _ = t.decode_artifact(path.read_bytes(), str(path),
                                  lambda meta, pieces: t.check_pieces(pieces, model))
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    model.load_state_dict(t.dequantise(tensors, model))
    return model.requires_grad_(False)


class Tokenizer:
    """SentencePiece, with the case transform where the data has it."""

    def __init__(self, path: Path, caseops: bool):
        from sentencepiece import SentencePieceProcessor

        self.caseops = caseops
        if caseops:
            from caseops.encoder import Encoder

            self.encoder = Encoder(path.read_bytes(), str(path))
            self.sp = self.encoder.sp
        else:
            self.sp = SentencePieceProcessor(model_file=str(path))

    def encode(self, text: str) -> list[int]:
        """Ids without BOS."""
        if self.caseops and text:
            return self.encoder.encode_documents([text], counts=False)[0][0].tolist()
        return self.sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text; operators that the model put where they mean nothing are left out."""
        text = self.sp.decode(ids)
        if self.caseops:
            from caseops.export import restore

            text, _ = restore(text)
        return text

    def textless(self) -> list[int]:
        """Ids that stand for no text, but BOS: they are never drawn."""
        return [i for i in range(len(self.sp)) if i != t.BOS and (
            self.sp.is_control(i) or self.sp.is_unknown(i) or self.sp.is_unused(i))]


def open_tokenizer(cfg: t.Config, root: Path) -> Tokenizer:
    """TOKENIZER_PATH, or the tokenizer beside the data, or the repository's own of VOCAB_SIZE;
    UserError where none fits."""
    from caseops.splits import find_tokenizer, read_manifest

    folder = t.data_folder(cfg)
    path = cfg.tokenizer_path or find_tokenizer(
        folder, read_manifest(folder) if folder.is_dir() else {})
    ours = sorted((root / "tokenizers").glob(f"*_{cfg.vocab_size}_*.model"))
    path = path or next(iter(ours), None)
    t.require(path, f"no tokenizer beside {folder}; set TOKENIZER_PATH to the data's")
    t.check_tokenizer(replace(cfg, tokenizer_path=str(path)), Path(path), {})
    return Tokenizer(Path(path), cfg.caseops_enabled)


@torch.no_grad()
def forwards(model: t.GPT, cfg: t.Config, rt: t.Runtime) -> Iterator[torch.Tensor]:
    """send(id) -> logits [V] float32 of the token after it. Keys and values of earlier tokens are
    kept, up to TTT_EVAL_SEQ_LEN of them; further back nothing is seen."""
    kv_cache = t.KVCache(replace(cfg, ttt_chunk_size=1), 1, rt.device, rt.dtype)
    before, place = t.BOS, 0
    token = yield
    while True:
        kv_cache.seek(torch.tensor(place, device=rt.device), slice(0, 1), min(place, kv_cache.ring))
        ids = torch.tensor([[before, token]], device=rt.device)
        h = model.hidden(ids, None, True, kv_cache=kv_cache)
        before, place = token, place + 1
        token = yield model.logits(h)[0, 0]


def draw(logits: torch.Tensor, temperature: float, top_p: float,
         generator: torch.Generator) -> int:
    """An id from logits [V]: among the likeliest that hold top_p of the probability at this
    temperature; at temperature 0 the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    p, order = (logits.double() / temperature).softmax(-1).cpu().sort(descending=True, stable=True)
    p[p.cumsum(0) - p >= top_p] = 0  # what stands before a token holds top_p already
    return int(order[torch.multinomial(p, 1, generator=generator)])


def generate(model: t.GPT, cfg: t.Config, rt: t.Runtime, prompt: list[int], never: list[int],
             told: Any) -> list[int]:
    """The ids after BOS and the prompt, up to the document's end or told.tokens of them."""
    generator, ask, found = torch.Generator().manual_seed(told.seed), forwards(model, cfg, rt), []
    next(ask)
    for token in (t.BOS, *prompt):
        logits = ask.send(token)
    while len(found) < told.tokens:
        logits[never] = -torch.inf
        token = draw(logits, told.temperature, told.top_p, generator)
        if token == t.BOS:
            break
        found.append(token)
        if len(found) < told.tokens:
            logits = ask.send(token)
    return found


def main(words: list[str]) -> None:
    """Print the prompt and what follows it."""
    told, root = arguments(words), Path(t.__file__).parent
    given = t.Config.from_env(os.environ, root, check=False)
    folder = told.folder or Path(given.artifact_dir or ".")
    cfg, _ = finished.configure(os.environ, root, folder)
    rt = t.Runtime(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = open_tokenizer(cfg, root)
    model, prompt = load(cfg, folder, rt), tokenizer.encode(told.prompt)
    ids = generate(model, cfg, rt, prompt, tokenizer.textless(), told)
    print(tokenizer.decode([*prompt, *ids]))
