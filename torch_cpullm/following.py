"""Rank 0 alone runs the user's program; the other ranks repeat every call of its decoder, on their share of the model.

A call is sent as one frame: JSON that names the arguments, then the bytes of tensors. Caches stay where they are: a
rank has one for each that rank 0 uses, and is told what else than the decoder changes them (beams, prompt lookup).
"""

from __future__ import annotations

import inspect
import json
import logging
import threading
import time
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from .collective import LostRankError, Ranks
from .config import KV_CACHES
from .kv_cache import CpuLlmCache
from .layer_spec import IGNORED

logger = logging.getLogger("torch_cpullm")

_FRAME = 4096  # bytes of the first broadcast; a longer message follows in a second one
_HEAD = 16  # bytes of its two lengths: of the JSON, of all
_CHANGES = ("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset")
_TYPES = {str(t).removeprefix("torch."): t for t in (torch.int64, torch.int32, torch.bool, torch.float32)}
_TYPES |= {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.uint8)}


class _Line:
    """Messages from rank 0 to the others, in order; one that is late by the ranks' timeout has lost its sender."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def send(self, message: dict[str, Any], tensors: list[Tensor]) -> None:
        """To all other ranks. Raises LostRankError where one is gone."""
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        body = torch.cat([text, *(t.contiguous().flatten().view(torch.uint8) for t in tensors)])
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        frame[:_HEAD].view(torch.int64)[:] = torch.tensor([len(text), len(body)])
        short = body[: _FRAME - _HEAD]
        frame[_HEAD : _HEAD + len(short)] = short
        self._broadcast(frame)
        if len(body) > len(short):
            self._broadcast(body)

    def receive(self) -> tuple[dict[str, Any], Tensor]:
        """(message, bytes of its tensors) from rank 0. Raises LostRankError where it is gone."""
        frame = torch.empty(_FRAME, dtype=torch.uint8)
        self._broadcast(frame)
        text, size = frame[:_HEAD].view(torch.int64).tolist()
        body = frame[_HEAD : _HEAD + size]
        if len(body) < size:
            body = torch.empty(size, dtype=torch.uint8)
            self._broadcast(body)
        return json.loads(bytes(body[:text].tolist())), body[text:]

    def _broadcast(self, x: Tensor) -> None:
        # Not dist.broadcast: the group is still needed when a program has destroyed its groups at its end.
        try:
            self._ranks.line.broadcast(x, 0).wait()
        except RuntimeError as error:
            raise self._ranks.lost(str(error)) from error


# ---- rank 0 ---------------------------------------------------------------------------------------------------------


class FollowedCache(CpuLlmCache):
    """A cache of rank 0 that notes what changes it beside the decoder. changes: (method, argument) since the last call.

    A copy is another cache, which no rank has.
    """

    changes: list[tuple[str, Any]]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "changes"}


def _noting(name: str) -> Any:
    original = getattr(CpuLlmCache, name)
    signature = inspect.signature(original)

    def method(self: FollowedCache, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)  # first: what raises has changed nothing
        if "changes" in self.__dict__:
            values = [*signature.bind(self, *args, **kwargs).arguments.values()][1:]
            self.changes.append((name, [v.tolist() if isinstance(v, Tensor) else int(v) for v in values]))
        return result

    return method


for _name in _CHANGES:
    setattr(FollowedCache, _name, _noting(_name))


class Leader:
    """Sends the calls of rank 0's decoder; between them, a sign of life. Ends with the decoder or the program."""

    def __init__(self, decoder: nn.Module, ranks: Ranks) -> None:
        self._line, self._ranks = _Line(ranks), ranks
        self._names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        self._lock = threading.Lock()  # of the line
        self._ended = threading.Event()
        self._known: weakref.WeakKeyDictionary[FollowedCache, int] = weakref.WeakKeyDictionary()
        self._count = 0
        self._gone: list[int] = []
        self._last_s = time.monotonic()
        self._caller: int | None = None  # the thread whose call runs
        self._wanted = threading.Event()
        decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        decoder.register_forward_hook(self.after, always_call=True)
        threading.Thread(target=self._live, daemon=True).start()
        weakref.finalize(decoder, self.end)

    def before(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Send a call. Raises TypeError for an argument that cannot be sent, ValueError for a cache that was filled,
        RuntimeError when the others have left, or another thread's call runs.
        """
        if self._caller is not None:
            raise RuntimeError("two threads call a model at once that several ranks share")
        if self._ended.is_set():
            raise RuntimeError("the other ranks have left this model, which has only a share of its weights here")
        message: dict[str, Any] = {"call": {}, "tensors": [], "gone": [], "caches": {}}
        message["grad"] = torch.is_grad_enabled()  # programs depend on it
        tensors: list[Tensor] = []
        named = dict(zip(self._names, args, strict=False)) | kwargs
        # Caches last: what has been noted of one must be sent, and another argument may be refused.
        for name, value in sorted(named.items(), key=lambda item: isinstance(item[1], CpuLlmCache)):
            if name in IGNORED:
                continue
            message["call"][name] = self._encoded(name, value, message, tensors)
        while self._gone:
            message["gone"].append(self._gone.pop())
        with self._lock:
            if self._caller is not None:  # since the look above
                raise RuntimeError("two threads call a model at once that several ranks share")
            self._caller = threading.get_ident()
            self._send(message, tensors)

    def after(self, *_: Any) -> None:
        """The decoder has been called, or the call was refused: then nothing has been sent."""
        if self._caller == threading.get_ident():
            self._last_s, self._caller = time.monotonic(), None

    def end(self) -> None:
        """Let the other ranks go."""
        # A collection of garbage may end the decoder in a thread that holds the lock: _live does it then.
        self._wanted.set()
        if not self._lock.acquire(timeout=self._ranks.timeout_s / 8):
            return
        try:
            if self._ended.is_set():
                return
            self._ended.set()
            self._send({"end": True}, [])
        except LostRankError as error:
            logger.warning("%s", error)
        finally:
            self._lock.release()

    def _send(self, message: dict[str, Any], tensors: list[Tensor]) -> None:
        self._line.send(message, tensors)
        self._last_s = time.monotonic()

    def _live(self) -> None:
        """Say now and then that rank 0 is there, while it does something else."""
        every_s = self._ranks.timeout_s / 4
        while not self._ended.wait(every_s / 2):
            if self._wanted.is_set():
                self.end()
            with self._lock:
                if self._ended.is_set() or self._caller is not None or time.monotonic() - self._last_s < every_s:
                    continue
                try:
                    self._send({}, [])
                except LostRankError:
                    return  # the next call says so, to whom it concerns

    def _encoded(self, name: str, value: Any, message: dict[str, Any], tensors: list[Tensor]) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, CpuLlmCache):
            return {"cache": self._number(value, message)}
        kind = str(getattr(value, "dtype", "")).removeprefix("torch.")
        if not isinstance(value, Tensor) or kind not in _TYPES:
            raise TypeError(
                f"the other ranks cannot be sent {name} = {type(value).__name__}: tensors, numbers and caches of "
                "torch_cpullm (the default) can"
            )
        if bool((value == 1).all()):  # a mask without padding
            return {"ones": list(value.shape), "dtype": kind}
        tensors.append(value)
        return {"tensor": list(value.shape), "dtype": kind}

    def _number(self, cache: CpuLlmCache, message: dict[str, Any]) -> int:
        """The number by which all ranks know a cache, and what they must do to theirs."""
        if isinstance(cache, FollowedCache) and cache in self._known:
            number = self._known[cache]
            message["caches"] = {"number": number, "changes": cache.changes}
            cache.changes = []
            return number
        if cache.get_seq_length():
            raise ValueError("past_key_values was filled before follow(), or is a copy: the other ranks have none")
        cache.__class__ = FollowedCache
        followed = cast("FollowedCache", cache)
        followed.changes = []
        self._known[followed] = self._count = self._count + 1
        weakref.finalize(cache, self._gone.append, self._count).atexit = False
        stored = cast("Any", cache.layers[0]).stored_dtype
        dtype = next(name for name, each in KV_CACHES.items() if each == stored)
        message["caches"] = {"new": self._count, "dtype": dtype}
        return self._count


# ---- the other ranks ------------------------------------------------------------------------------------------------


def repeat_calls(decoder: nn.Module, ranks: Ranks) -> None:
    """Call ``decoder`` as rank 0 does, until that one leaves. Raises LostRankError where a rank is dead or hangs."""
    line = _Line(ranks)
    caches: dict[int, CpuLlmCache] = {}
    while True:
        message, data = line.receive()
        if "end" in message:
            return
        if "call" not in message:
            continue
        for number in message["gone"]:
            caches.pop(number, None)
        about = message["caches"]
        if "new" in about:
            caches[about["new"]] = CpuLlmCache(decoder.config, about["dtype"])
        for name, value in about.get("changes", ()):
            _change(caches[about["number"]], name, value)
        arguments = {}
        for name, value in message["call"].items():
            arguments[name], data = _decoded(value, caches, data)
        try:
            with torch.set_grad_enabled(message["grad"]):
                decoder(**arguments)
        except LostRankError:
            raise
        except Exception as error:  # noqa: BLE001  rank 0 has met it too, and decides what follows
            logger.warning("rank %d: %s: %s", ranks.rank, type(error).__name__, error)


def _change(cache: CpuLlmCache, name: str, value: Any) -> None:
    if name not in _CHANGES:
        raise ValueError(f"a cache has no change {name!r}")
    method = getattr(cache, name)
    method(*(torch.tensor(v) if isinstance(v, list) else v for v in value))


def _decoded(value: Any, caches: dict[int, CpuLlmCache], data: Tensor) -> tuple[Any, Tensor]:
    """(argument, the bytes behind it)."""
    if not isinstance(value, dict):
        return value, data
    if "cache" in value:
        return caches[value["cache"]], data
    dtype = _TYPES[value["dtype"]]
    if "ones" in value:
        return torch.ones(value["ones"], dtype=dtype), data
    new = torch.empty(value["tensor"], dtype=dtype)
    new.flatten().view(torch.uint8).copy_(data[: new.nbytes])
    return new, data[new.nbytes :]
