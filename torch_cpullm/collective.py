"""Sums over ranks of torch.distributed: through gloo, or on one host through shared memory."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops

TIMEOUT_S = 8.0
"""Seconds that a rank waits for the others before it gives up."""

TRANSPORTS = ("auto", "gloo", "shared memory")

_SHARED_BYTES = 256 << 10  # of a buffer: a decode step's sum at once, a prompt's in parts that stay in the caches
_MESSAGE_BYTES = 1024
_MOST_RANKS = 64  # that the operators sum over
_NO_ANSWER = "no answer in shared memory"


class LostRankError(RuntimeError):
    """A rank is dead or hangs: the model cannot go on."""


def meet(group: dist.ProcessGroup | None, failed: str = "") -> None:
    """Wait for all ranks of the caller's group, as long as its timeout allows. LostRankError where one has failed.

    failed: why this rank has; it does not wait long for the others, which get to know. ValueError for a group whose
    backend moves no tensors of the CPU.
    """
    backends = dist.get_backend_config(group)
    if "cpu:" not in backends:
        raise ValueError(
            f"torch_cpullm computes on the CPU, and the process group's backend ({backends}) moves no CPU tensors: "
            'init_process_group("gloo"), or "cpu:gloo,cuda:nccl"'
        )
    own = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device="cpu")  # transformers builds models on meta
    data = failed.encode()[:_MESSAGE_BYTES]
    own[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device="cpu")
    found = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    try:
        work = dist.all_gather(found, own, group=group, async_op=True)
        work.wait(timedelta(seconds=TIMEOUT_S)) if failed else work.wait()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostRankError(f"another rank has ended, or is late, before all had the model ({reason})") from error
    for rank, text in enumerate(found):
        if bool(text.any()) and not failed:
            said = bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
            raise LostRankError(f"rank {rank} of {len(found)} could not load the model: {said}")


class Ranks:
    """The ranks that share a model. all_reduces, bytes: counts of what this rank has put into sums so far.

    team: those of them that cut a layer with this one, where a layer is not cut among all: see :meth:`divide`.
    """

    team: Ranks | None = None

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError('torch.distributed is not initialised: torch.distributed.init_process_group("gloo")')
        members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        if dist.get_rank() not in members:
            raise ValueError(f"rank {dist.get_rank()} is not in the process group, whose ranks are {members}")
        if len(members) < 2:
            raise ValueError("a process group of one rank has nothing to share: start several, as torchrun does")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        meet(group)  # ranks load at their own pace: so far the caller's timeout holds
        self.rank, self.size, self.timeout_s = members.index(dist.get_rank()), len(members), timeout_s
        self.all_reduces = self.bytes = 0
        self._shared: Tensor | None = None
        self._dead: list[LostRankError] = []  # also the team's: one that is lost to it is lost to all
        self._name = f"rank {self.rank} of {self.size}"
        self._lock = threading.Lock()
        # Of its own, so that no rank waits longer than this whatever the timeout of the caller's group; and one for
        # messages of following.py, made here where all ranks are together.
        self.group, self.line = self._new_group(members), self._new_group(members)

    def _new_group(self, members: list[int]) -> Any:
        patience = timedelta(seconds=self.timeout_s)
        try:
            return dist.new_group(members, timeout=patience, backend="gloo", use_local_synchronization=True)
        except RuntimeError as error:
            raise self.lost(str(error)) from error

    def divide(self, size: int) -> Ranks:
        """The team of this rank: of the first ``size`` ranks, of the next ``size``, ...; called on all of them."""
        members = dist.get_process_group_ranks(self.group)
        first = self.rank // size * size
        team = Ranks(self._new_group(members[first : first + size]), self.timeout_s)
        team._dead, team._name, team._lock = self._dead, self._name, self._lock
        self.team = team
        return team

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread's sums at a time: the others' ranks would take one call's numbers for another's."""
        if self._dead:
            raise self._dead[0]
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("two threads call a model at once that several ranks share")
        try:
            yield
        finally:
            self._lock.release()

    @property
    def transport(self) -> str:
        """What sums go through."""
        return "gloo" if self._shared is None else "shared memory"

    @property
    def inside(self) -> bool:
        """Whether operators make all sums, the team's too."""
        return all(each is None or each._shared is not None for each in (self, self.team))

    def use(self, transport: str, width: int) -> None:
        """Choose how to sum, one of TRANSPORTS; auto: what is faster for float32 [width], tried out.

        ValueError, on all ranks, where they have no memory to share.
        """
        if transport != "gloo":
            self._share_memory(width, required=transport == "shared memory")

    def _share_memory(self, width: int, *, required: bool) -> None:
        """Map one piece of memory into all ranks and keep it where it is faster than gloo, or required.

        The file behind it has no name any more when this returns, so that nothing is left of ranks that are killed.
        """
        size = self.size * (64 + 2 * _SHARED_BYTES)
        file = _new_file(size) if self.rank == 0 else None
        try:
            path = self.gather("" if file is None else str(file))[0]
            shared, where = _map(path, size)
            places = self.gather(where)
        finally:
            if file is not None:
                file.unlink()
        if "" in places or len(set(places)) > 1 or 4 * width > _SHARED_BYTES or self.size > _MOST_RANKS:
            if required:
                raise ValueError(
                    "the ranks have no memory to share: they must run on one host, with room in /dev/shm, and sum rows "
                    f"of at most {_SHARED_BYTES // 4} floats"
                )
            return
        x = torch.zeros(width)
        gloo_s = self.seconds_of(x)
        self._shared = shared
        faster = self.gather(str(self.seconds_of(x) < gloo_s))
        self.all_reduces = self.bytes = 0
        if not required and "False" in faster:
            self._shared = None

    def seconds_of(self, x: Tensor, rounds: int = 30) -> float:
        """Median seconds of a sum like x, by this rank's clock."""
        spent = []
        for _ in range(rounds):
            start = time.perf_counter()
            self.sum(x.clone())
            spent.append(time.perf_counter() - start)
        return statistics.median(spent)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x, float32 [.., n], over all ranks, the same bits on all, perhaps in x.

        LostRankError where a rank is dead or hangs.
        """
        x = x.contiguous()
        with self._alone():
            self._count(1, x)
            if self._shared is not None:
                if not ops.shared_sum(x, self._shared, self.rank, self.size, self.timeout_s):
                    raise self.lost(_NO_ANSWER)
                return x
            try:
                dist.all_reduce(x, group=self.group)
            except RuntimeError as error:
                raise self.lost(str(error)) from error
            return x

    def run(
        self, operator: Callable[..., Tensor], arguments: tuple[Any, ...], x: Tensor, sums: int, team_sums: int = 0
    ) -> Tensor:
        """``operator(*arguments, ..)``, which sums ``sums`` times as many floats as x has in shared memory itself.

        team_sums: and so often over the team. LostRankError where a rank is dead or hangs.
        """
        memory: tuple[Any, ...] = self._shared, self.rank, self.size, self.timeout_s
        with self._alone():
            self._count(sums, x)
            if self.team is not None and team_sums:
                self.team._count(team_sums, x)
                memory += self.team._shared, self.team.rank, self.team.size
            try:
                return operator(*arguments, *memory)
            except RuntimeError as error:
                if _NO_ANSWER not in str(error):
                    raise
                raise self.lost(_NO_ANSWER) from error

    def _count(self, sums: int, x: Tensor) -> None:
        self.all_reduces += sums
        self.bytes += 4 * sums * x.numel()

    def gather(self, text: str) -> list[str]:
        """``text`` of every rank."""
        own = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        try:
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self.group)
            room = torch.zeros(max(1, int(max(sizes))), dtype=torch.uint8)
            room[: len(own)] = own
            found = [torch.empty_like(room) for _ in range(self.size)]
            dist.all_gather(found, room, group=self.group)
        except RuntimeError as error:
            raise self.lost(str(error)) from error
        return [bytes(each[: int(size)].tolist()).decode() for each, size in zip(found, sizes, strict=True)]

    def check_alike(self, what: str, text: str) -> None:
        """ValueError, on every rank, where ``text`` is not the same on all of them."""
        found = self.gather(text)
        other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
        if other is not None:
            raise ValueError(f"{what} must be the same on all ranks: {found[0]} on rank 0, {found[other]} on {other}")

    def lost(self, why: str) -> LostRankError:
        """What to raise where another rank does not answer, now and in every call to come."""
        self._dead[:] = [
            LostRankError(
                f"{self._name}: another rank has ended, or has not answered for {self.timeout_s:g} s; "
                f"this model cannot go on ({why.splitlines()[0]})"
            )
        ]
        return self._dead[0]


def _new_file(size: int) -> Path | None:
    """A file of zeros in memory, None where there is no room for it."""
    try:
        handle, path = tempfile.mkstemp(prefix="cpullm_", dir="/dev/shm")
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, size)  # room now, instead of a signal when it is written
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(handle)
    return Path(path)


def _map(path: str, size: int) -> tuple[Tensor | None, str]:
    """(the file's memory, what tells it from files of other hosts); (None, "") where there is no such file."""
    try:
        found = os.stat(path)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        shared = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError):
        return None, ""
    return shared, f"{boot} {found.st_dev} {found.st_ino}"


# ---- what an all-reduce costs ---------------------------------------------------------------------------------------


def all_reduce_seconds(width: int, *, rounds: int = 300) -> tuple[float, str]:
    """(median seconds, transport) of a sum of float32 [width] over two local processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_time_sums, (folder, width, rounds), nprocs=2)
        seconds, transport = json.loads(Path(folder, "found").read_text(encoding="ascii"))
        return float(seconds), str(transport)


def _time_sums(rank: int, folder: str, width: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks = Ranks(None, 60.0)
    ranks.use("auto", width)
    found = ranks.seconds_of(torch.zeros(width), rounds), ranks.transport
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found), encoding="ascii")
    dist.barrier()  # no rank leaves while another is being asked
    dist.destroy_process_group()
