"""Ranks of torch.distributed for tests: processes of one thread each over gloo, which meet in a file."""

import json
import multiprocessing
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd.profiler import profile

# Imported once, by the process that ranks are forked from.
PRELOAD = ["transformers.models.llama.modeling_llama", "transformers.generation.utils", "layer_models", "ranks"]
PRELOAD += ["torch_cpullm.distributed", "torch_cpullm.cqil", "torch_cpullm.swap", "torch_cpullm.hf"]


def run(work, folder, *arguments, world=2, timeout_s=100):
    """``work(rank, *arguments)`` on every rank: what each returned (as JSON has it), {"error": ..} where it raised,
    and {"died": exit code} where it left nothing behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    started = [
        context.Process(target=_enter, args=(work, rank, world, str(folder), arguments), daemon=True)
        for rank in range(world)
    ]
    for process in started:
        process.start()
    end = time.monotonic() + timeout_s
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in started if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"ranks did not end within {timeout_s} s"
    files = [folder / f"{rank}.json" for rank in range(world)]
    return [
        json.loads(file.read_text()) if file.exists() else {"died": process.exitcode}
        for file, process in zip(files, started, strict=True)
    ]


def _enter(work, rank, world, folder, arguments):
    torch.set_num_threads(1)
    where = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        with torch.no_grad():
            result = work(rank, *arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        result = {"error": f"{type(error).__name__}: {error}", "at": time.time()}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


class Operators(profile):
    """Counts calls of operators of layers by name. Not a dispatch mode: a layer that one looks at runs as none."""

    @property
    def calls(self):
        names = [event.name.removeprefix("cpullm::") for event in self.function_events if "cpullm::" in event.name]
        return Counter(name for name in names if "layer" in name)
