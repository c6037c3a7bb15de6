"""Threads that work beside the steps of a training: they read, make batches and write checkpoints."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def beside(count: int, name: str) -> ThreadPoolExecutor:
    """`count` threads, named after `name`, in which torch computes with one thread each.

    Otherwise each brings a team of OpenMP threads of its own. As soon as a process has more of these than there are cores, GNU's
    OpenMP lets a team sleep between any two operations, also the one that takes the steps: on 2 cores that makes the steps of a
    small network 1.4 times as long.
    """
    # This sets the number for threads that have not computed yet, too; the one that takes the steps has its own by then.
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(1,))
