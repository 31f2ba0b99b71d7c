"""Checkpoints and the watch over the ranks: a run may be killed at any moment and goes on.

train_gpt.py imports this where CHECKPOINT_EVERY_SECONDS asks for it or more than one rank runs.
One file, ARTIFACT_DIR/checkpoint.pt, holds the training; while the artifact is scored each rank
has checkpoint.ttt.RANK.ROUND.pt. They are written aside and renamed, and removed when the run is
complete, so a checkpoint that is found belongs to a run that is not."""

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import train_gpt as t

FORMAT = 2
# Seconds between signs of life; without one until a rank counts as dead (compiling holds the
# interpreter for tens of them); without an answer of the store until its host counts as gone.
BEAT, SILENT, UNREACHED = 2.0, 120.0, 90.0


class Checkpointer:
    """Saves and restores one run; every method that says so is a call of all ranks.

    Identity is program, settings and data: another run's checkpoint is an error, not a start. Of
    the data that is what the manifest says, and what `shard_digest` reads."""

    def __init__(self, cfg: t.Config, rt: t.Runtime, folder: Path, data: str):
        self.every, self.rt, self.folder = cfg.checkpoint_every_seconds, rt, folder
        self.path, self.last, self.told = folder / "checkpoint.pt", 0.0, False
        self.earlier = 0.0  # seconds of scoring before the run was killed
        self.identity = {
            "format": FORMAT, "data": hashlib.sha256(data.encode()).hexdigest(),
            "shards": shard_digest(t.data_folder(cfg)), "program": t.PROGRAM_DIGEST,
            **{k: v for k, v in t.changed(cfg).items() if k not in t.NOT_OF_A_RUN}}
        self.state = self.read(self.path) or {"stage": "start"}
        if "record" in self.state:
            rt.record.update(self.state["record"])
            rt.record["resumed"] = rt.record.get("resumed", 0) + 1

    @property
    def stage(self) -> str:
        """start, training, trained (the average is in `model`) or packed (artifact written)."""
        return self.state["stage"]

    def read(self, path: Path) -> dict[str, Any] | None:
        """A checkpoint, None where there is none; UserError if it is damaged or another run's."""
        if not path.is_file():
            return None
        remedy = "delete it to start anew, or set another ARTIFACT_DIR"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            told = state["identity"]
        except Exception as error:  # damaged files make the reader raise nearly anything
            reason = str(error).partition("\n")[0]
            raise t.UserError(f"{path}: unreadable checkpoint ({reason}); {remedy}") from None
        unlike = sorted(k for k in told.keys() | self.identity
                        if told.get(k) != self.identity.get(k))
        if unlike:
            raise t.UserError(f"{path}: of a run with other {', '.join(unlike)}; {remedy}")
        return state

    def write(self, path: Path, state: dict[str, Any]) -> None:
        """One file, whole or not at all."""
        buffer = io.BytesIO()
        state = {**state, "identity": self.identity, "record": self.rt.record}
        torch.save(state, buffer)
        t.write_atomic(path, buffer.getvalue())

    # ---- when

    def listen(self) -> None:
        """From here SIGTERM is answered at the next step; a second one ends the process at once."""
        def note(number, frame):
            self.told = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, note)

    def unlisten(self) -> None:
        """SIGTERM ends the process again."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def due(self, seconds: float) -> bool:
        """Whether to save now; the clock is shared by all ranks, and rank 0 hears SIGTERM for all
        (a call of all ranks)."""
        self.told = bool(self.rt.sync_clock(float(self.told)))
        return self.told or seconds - self.last >= self.every

    def stop_if_told(self, what: str) -> None:
        """After a save: end the process if SIGTERM asked for it, with the exit code of one."""
        if self.told:
            if self.rt.heartbeat:
                self.rt.heartbeat.close()
            self.rt.log(f"stopped by SIGTERM {what}; the same command goes on from there")
            sys.exit(128 + signal.SIGTERM)

    # ---- training

    def save_training(self, model: t.GPT, optimisers: t.Optimisers, ema: t.Ema,
                      clock: dict[str, Any]) -> None:
        """The state after clock["step"] steps and clock["seconds"] of training, with what else the
        loop must know (a call of all ranks)."""
        momenta = [whole_bank(m, p, self.rt) for m, p in
                   zip(optimisers.momenta, optimisers.banks, strict=True)]
        self.last = clock["seconds"]
        if self.rt.rank == 0:
            self.write(self.path, {
                "stage": "training", "step": clock["step"], "clock": clock, "momenta": momenta,
                "model": cpu(model.state_dict()), "ema": cpu(ema.average),
                "adamw": cpu(optimisers.adamw.state_dict()), "rng": torch.get_rng_state()})
            self.rt.log(f"checkpoint: step:{clock['step']} "
                        f"train_time:{1000 * clock['seconds']:.0f}ms")
        self.stop_if_told(f"after step {clock['step']}")

    def restore_training(self, model: t.GPT, optimisers: t.Optimisers,
                         ema: t.Ema) -> dict[str, Any]:
        """The clock that was saved, all else put in place; {} without a checkpoint."""
        self.listen()
        if self.stage != "training":
            return {}
        state = self.state
        model.load_state_dict(state["model"])
        rank, world = self.rt.rank, self.rt.world
        with torch.no_grad():
            torch._foreach_copy_(ema.average, [x.to(self.rt.device) for x in state["ema"]])
            for mine, bank in zip(optimisers.momenta, state["momenta"], strict=True):
                pad = torch.nn.functional.pad(bank, (0, 0, 0, 0, 0, len(mine) * world - len(bank)))
                mine.copy_(pad[rank * len(mine):(rank + 1) * len(mine)])
        optimisers.adamw.load_state_dict(state["adamw"])
        torch.set_rng_state(state["rng"])
        clock = state["clock"]
        self.last = clock["seconds"]
        self.rt.log(f"resumed: step:{clock['step']} train_time:{1000 * clock['seconds']:.0f}ms")
        return clock

    def mark(self, stage: str, model: t.GPT | None, step: int) -> None:
        """A stage is complete: `trained` with the averaged weights, `packed` without any."""
        self.unlisten()
        if self.rt.rank == 0:
            self.write(self.path, {"stage": stage, "step": step,
                                   "model": model and cpu(model.state_dict())})

    def restore_trained(self, model: t.GPT) -> int:
        """The averaged weights of a run that had trained to its end; returns its steps."""
        model.load_state_dict(self.state["model"])
        self.rt.log(f"resumed: training had ended step:{self.state['step']}")
        return self.state["step"]

    # ---- scoring

    def scoring(self, model: t.GPT, meter: t.Meter, generator: torch.Generator,
                advance: t.ScoreProgress) -> "Scoring":
        """What keeps this rank's scoring; with a checkpoint it knows where to go on (a call of all
        ranks)."""
        self.listen()
        return Scoring(self, model, meter, generator, advance)

    def finish(self) -> None:
        """The run is complete: nothing is left to resume (a call of all ranks)."""
        self.unlisten()
        self.rt.barrier()
        if self.rt.rank == 0:
            for path in (self.path, *self.folder.glob("checkpoint.ttt.*.pt")):
                path.unlink(missing_ok=True)


class Scoring:
    """Saves this rank's scoring between two batches; every rank has files of its own.

    `at` is (round, batches done in it). A round begins with a save, and the file of the round
    before stays: ranks may be killed on both sides of a global phase, and all go on in the earlier
    round. Base weights change in global phases only, so round 0 needs none."""

    def __init__(self, checkpointer: Checkpointer, model: t.GPT, meter: t.Meter,
                 generator: torch.Generator, advance: t.ScoreProgress):
        self.checkpointer, self.model, self.meter = checkpointer, model, meter
        self.generator, self.advance, self.last = generator, advance, 0.0
        files = checkpointer.folder.glob(f"checkpoint.ttt.{checkpointer.rt.rank}.*.pt")
        latest = max((int(path.name.split(".")[3]) for path in files), default=0)
        ranks = checkpointer.rt
        self.state = checkpointer.read(self.path(int(min(gathered(latest, ranks)))))
        world = self.state["world"] if self.state else ranks.world
        if world != ranks.world:  # who scores what depends on it
            raise t.UserError(f"{checkpointer.folder}: {world} process(es) began to score; go on "
                              "with as many, or delete checkpoint.ttt.* there to score anew")
        self.at = tuple(self.state["at"]) if self.state else (0, 0)

    @property
    def warm(self) -> bool:
        """Whether a batch of full size has run, so that its adapters' A goes on."""
        return bool(self.state and self.state["A"])

    def path(self, number: int) -> Path:
        return self.checkpointer.folder / f"checkpoint.ttt.{self.checkpointer.rt.rank}.{number}.pt"

    @torch.no_grad()
    def restore(self, adapter: t.LoraTTT | None) -> None:
        """Everything that scoring had changed, in place."""
        if not self.state:
            return
        state, meter = self.state, self.meter
        sums = meter.nats, meter.tokens, meter.bytes, meter.lengths, meter.kept
        if len(meter.kept) != len(state["meter"][-1]):
            raise t.UserError("this run began with another SCORES_PATH; go on with the same, or "
                              f"delete {self.checkpointer.folder}/checkpoint.*")
        for mine, saved in zip(sums, state["meter"], strict=True):
            mine.copy_(saved)
        for name, A in state["A"].items():
            adapter.lora.A[name].copy_(A)
        if state["model"]:
            self.model.load_state_dict(state["model"])
        self.generator.set_state(state["rng"])
        self.last = self.checkpointer.earlier = state["seconds"]
        self.advance.started -= state["seconds"]
        self.advance.done = state["done"]
        self.checkpointer.rt.log(f"resumed: scoring round:{self.at[0]} batch:{self.at[1]} "
                                 f"time:{state['seconds']:.1f}s")

    def save(self, at: tuple[int, int], adapter: t.LoraTTT | None) -> None:
        """Before batch `at`: save if it is time, a round begins, or SIGTERM ends the run here."""
        seconds, checkpointer = self.advance.seconds(), self.checkpointer
        begins = at[0] > 0 and at[1] == 0
        if not (begins or checkpointer.told or seconds - self.last >= checkpointer.every):
            return
        self.last = seconds
        checkpointer.write(self.path(at[0]), {
            "at": list(at), "world": checkpointer.rt.world, "seconds": seconds,
            "done": self.advance.done,
            "A": cpu(dict(adapter.lora.A)) if adapter else {},
            "model": cpu(self.model.state_dict()) if at[0] else {},
            "meter": cpu([self.meter.nats, self.meter.tokens, self.meter.bytes,
                          self.meter.lengths, self.meter.kept]),
            "rng": self.generator.get_state()})
        self.path(at[0] - 2).unlink(missing_ok=True)
        checkpointer.stop_if_told(f"before batch {at[1]} of round {at[0]} of the scoring")


def shard_digest(folder: Path) -> str:
    """sha256 over name, size and values of every shard and sidecar in the folder: all values of one
    of up to 262,144, else 64 stretches of 4,096 from the first to the last, evenly spread. Of the
    challenge's 80 shards of 200 MB that is 42 MB. UserError for a file that is no shard."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("fineweb_*.bin")):
        values = t.open_shard(path)
        digest.update(f"{path.name} {len(values)} ".encode())
        for begin in np.linspace(0, max(0, len(values) - 4096), 64).astype(int):
            digest.update(values[begin : begin + 4096])
    return digest.hexdigest()


def cpu(x: Any) -> Any:
    """A copy of nested lists and dicts with their tensors on the host."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {k: cpu(v) for k, v in x.items()}
    return [cpu(v) for v in x] if isinstance(x, list | tuple) else x


def whole_bank(mine: torch.Tensor, bank: torch.Tensor, rt: t.Runtime) -> torch.Tensor:
    """[n, ...] on the host from every rank's share (a call of all ranks)."""
    if rt.world == 1:
        return cpu(mine)
    full = mine.new_empty(len(mine) * rt.world, *mine.shape[1:])
    dist.all_gather_into_tensor(full, mine.contiguous())
    return cpu(full[: len(bank)])


def gathered(number: float, rt: t.Runtime) -> list[float]:
    """The number of every rank (a call of all ranks)."""
    if rt.world == 1:
        return [number]
    parts = [torch.zeros(1, dtype=torch.float64) for _ in range(rt.world)]
    dist.all_gather(parts, torch.tensor([number], dtype=torch.float64))
    return [float(x) for x in parts]


# ---- the ranks

class Heartbeat(threading.Thread):
    """Every rank says that it lives, and looks at the others: one that is gone ends the run.

    On the same host a process that does not exist is seen at once, on another one (or a stopped
    one) after SILENT seconds. Signs of life go through the store that torchrun serves, so they need
    no rank; a store that fails or does not answer for UNREACHED seconds means that its host is
    gone. A call to it may never return, so a second thread watches that."""

    def __init__(self, rt: t.Runtime):
        super().__init__(daemon=True)
        self.rank, self.world = rt.rank, rt.world
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.store.set(f"place/{rt.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        self.places = [json.loads(self.store.get(f"place/{r}")) for r in range(rt.world)]
        self.seen = {r: (0, time.monotonic()) for r in range(rt.world)}
        self.done, self.reached = False, time.monotonic()

    def start(self) -> None:
        """Both threads."""
        super().start()
        threading.Thread(target=self.watch_store, daemon=True).start()

    def watch_store(self) -> None:
        """End this rank if the store is not reached; a thread that both were starved by is no
        reason, so the time must be up twice in a row."""
        late = 0
        while not self.done and late < 2:
            time.sleep(BEAT)
            late = late + 1 if time.monotonic() - self.reached > UNREACHED else 0
        if not self.done:
            print(f"error: rank {self.rank} has not reached torchrun's store for {UNREACHED:.0f}s: "
                  "its host is gone, or the network. Start again: with CHECKPOINT_EVERY_SECONDS "
                  "the run goes on from its last checkpoint", file=sys.stderr, flush=True)
            os._exit(1)

    def run(self) -> None:
        """Until the run is over: beat, look, sleep."""
        while not self.done:
            with contextlib.suppress(RuntimeError):
                self.store.add(f"beat/{self.rank}", 1)
                if self.ended():  # some rank is through: they all end now
                    self.done = True
                    return
                dead = next((r for r in range(self.world) if r != self.rank and self.is_dead(r)),
                            None)
                if dead is not None:
                    self.report(dead)
                self.reached = time.monotonic()
            time.sleep(BEAT)

    def ended(self) -> bool:
        """Whether a rank has said that the run is over."""
        return self.store.add("over", 0) > 0

    def is_dead(self, rank: int) -> bool:
        host, pid = self.places[rank]
        if host == socket.gethostname() and not alive(pid):
            return not self.ended()
        count, now = self.store.add(f"beat/{rank}", 0), time.monotonic()
        if count != self.seen[rank][0]:
            self.seen[rank] = count, now
        return now - self.seen[rank][1] > SILENT and not self.ended()

    def report(self, rank: int) -> None:
        """Name the rank that is gone and take this one down; no collective can go on."""
        host, pid = self.places[rank]
        if host == socket.gethostname():  # a stopped one would hold up the launcher
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        print(f"error: rank {rank} (process {pid} on {host}) has died; rank {self.rank} stops too. "
              "Start again: with CHECKPOINT_EVERY_SECONDS the run goes on from its last checkpoint",
              file=sys.stderr, flush=True)
        os._exit(1)

    def close(self) -> None:
        """This rank is through, in order or with its own message."""
        self.done = True
        with contextlib.suppress(RuntimeError):
            self.store.add("over", 1)


def await_store(address: str, port: str, listens: bool, seconds: float) -> None:
    """Until the store of the ranks answers at (address, port); OSError where the name is unknown or
    nobody answers in time. listens: this process will be the host. PyTorch's own client would go on
    for minutes and print its stack."""
    socket.getaddrinfo(address, port)
    end = time.monotonic() + seconds
    while not listens:
        try:
            socket.create_connection((address, port), timeout=2).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process of this host runs; one that has ended and awaits its parent does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no /proc here
        return True
