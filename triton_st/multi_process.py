"""Encoding by several processes: a pool of workers, each with the model, that take chunks of texts in turn."""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as mp
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from triton_st.encoding import Encoding

Pool = dict[str, Any]
"""`input` and `output`, queues; `processes`, the workers: sentence-transformers' form. `lock`: one call at a time."""

_calls = itertools.count()
"""Numbers calls, so that what one that was interrupted left in a queue is not taken for the next one's."""

_LARGEST_CHUNK = 5000
_CHUNKS_PER_PROCESS = 10


def start_pool(model: Encoding, devices: Sequence[str | torch.device] | None) -> Pool:
    """Start one process for each device; by default one for each GPU, or four on the CPU.

    The model's parameters go to shared memory on the CPU, from where each worker takes them to its device.
    """
    if devices is None:
        count = torch.cuda.device_count()
        devices = [f"cuda:{i}" for i in range(count)] if count else ["cpu"] * 4
    model.to("cpu")
    model.share_memory()
    context = mp.get_context("spawn")
    pool: Pool = {"input": context.Queue(), "output": context.Queue(), "processes": [], "lock": threading.Lock()}
    threads = max(1, torch.get_num_threads() // len(devices))
    for device in devices:
        process = context.Process(
            target=_work, args=(model, str(device), threads, pool["input"], pool["output"]), daemon=True
        )
        process.start()
        pool["processes"].append(process)
    return pool


def stop_pool(pool: Pool) -> None:
    """End the workers, whatever they are doing, and close the queues."""
    for process in pool["processes"]:
        process.terminate()
    for process in pool["processes"]:
        process.join()
        process.close()
    pool["input"].cancel_join_thread()
    pool["input"].close()
    pool["output"].close()


def encode_in_pool(
    pool: Pool, texts: Sequence[str], chunk_size: int | None, show_progress_bar: bool, arguments: dict[str, Any]
) -> list[Any]:
    """`model.encode(chunk, **arguments)` of every chunk of texts, in order.

    Raises:
        RuntimeError: a worker died. Whatever a worker's `encode` raised is raised here, once all chunks are through.
    """
    if chunk_size is None:
        share = math.ceil(len(texts) / len(pool["processes"]) / _CHUNKS_PER_PROCESS)
        chunk_size = max(1, min(share, _LARGEST_CHUNK))
    starts = range(0, len(texts), chunk_size)
    call = next(_calls)
    results: list[Any] = [None] * len(starts)
    with pool["lock"]:
        try:
            for number, start in enumerate(starts):
                pool["input"].put((call, number, texts[start : start + chunk_size], arguments))
            for _ in tqdm(starts, desc="Encode", unit="chunk") if show_progress_bar else starts:
                number, result = _next_result(pool, call)
                results[number] = result
        except BaseException:  # KeyboardInterrupt too: nobody wants the rest
            with contextlib.suppress(queue.Empty):
                while True:
                    pool["input"].get(timeout=0.1)
            raise
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _next_result(pool: Pool, call: int) -> tuple[int, Any]:
    while True:
        try:
            of, number, result = pool["output"].get(timeout=1.0)
            if of == call:
                return number, result
        except queue.Empty:
            dead = [f"{p.pid} (exit code {p.exitcode})" for p in pool["processes"] if not p.is_alive()]
            if dead:
                raise RuntimeError(
                    f"a worker of the pool died: process {', '.join(dead)}; stop the pool and start another"
                ) from None


def _work(model: Encoding, device: str, threads: int, chunks: Any, results: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has the pool
    torch.set_num_threads(threads)  # the workers share the machine
    while True:
        call, number, texts, arguments = chunks.get()
        try:
            result = model.encode(texts, device=device, show_progress_bar=False, **arguments)
        except Exception as error:  # reported where it was asked for; a silent worker would be waited for without end
            results.put((call, number, _portable(error)))
        else:
            results.put((call, number, result))


def _portable(error: Exception) -> Exception:
    """The error, or its text where it cannot travel between processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
