"""Runs a function in several processes, the ranks of a group on this machine."""

import contextlib
import io
import multiprocessing
import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

# A process of its own for each rank and test; each starts from one that has imported torch already.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "topn_gating.distributed", "torch.distributed.checkpoint", "torch.distributed.fsdp"])
PATIENCE = 120  # seconds, after which a test is said to hang


class RankError(Exception):
    """What a rank raised: its type's name and message."""


def run_ranks(world, function, *args, timeout=30, lost=(), backend="gloo"):
    """Returns what ``function(rank, *args)`` returns on each rank, or the error that it raised there.

    ``timeout`` and ``backend`` are the group's. The ranks ``lost`` are expected to end without an answer, which is None.
    """
    # The store is here, so that it outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(world):
        here, there = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(
            target=_rank, args=(there, store.port, world, rank, timeout, backend, function, args), daemon=True
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return [_answer(pipe, rank in lost) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def results(world, function, *args, **kwargs):
    """What :func:`run_ranks` returns, where no rank may raise."""
    answers = run_ranks(world, function, *args, **kwargs)
    for rank, answer in enumerate(answers):
        if isinstance(answer, RankError):
            raise AssertionError(f"rank {rank}: {answer}")
    return answers


def errors(world, function, *args, **kwargs):
    """The messages of the errors that all ranks have to raise."""
    answers = run_ranks(world, function, *args, **kwargs)
    assert all(isinstance(answer, RankError) for answer in answers if answer is not None), answers
    return [str(answer) for answer in answers if answer is not None]


def _answer(pipe, may_be_lost):
    assert pipe.poll(PATIENCE), "a rank hangs"
    try:
        data = pipe.recv_bytes()
    except EOFError:
        assert may_be_lost, "a rank has died"
        return None
    return torch.load(io.BytesIO(data), weights_only=False)


def _rank(pipe, port, world, rank, timeout, backend, function, args):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        torch.manual_seed(0)
        answer = function(rank, *args)
    except Exception as error:
        answer = RankError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(Exception):
            answer.add_note(traceback.format_exc())
    data = io.BytesIO()
    torch.save(answer, data)
    pipe.send_bytes(data.getvalue())
    pipe.close()
    os._exit(0)  # gloo's threads may still wait for a rank that is gone
