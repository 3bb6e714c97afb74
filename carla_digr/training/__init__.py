"""The offline stages: teacher, saliency dataset, student, evaluation."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One offline stage: its name on the command line, what it does, and what it leaves in the output directory."""

    name: str
    summary: str
    output: str


# In the order in which each needs the outputs of those before it.
STAGES = (
    Stage("train-teacher", "train the teacher by PPO", "teacher.safetensors"),
    Stage("make-dataset", "compute the teacher's perturbation saliency maps", "dataset"),
    Stage("distill", "distil the student by DIGR", "student.safetensors"),
    Stage("evaluate", "measure teacher and student and write a report", "evaluation/report.md"),
)


def prepare_process() -> None:
    """Settings of what trains, or explains live: one torch thread, and freed memory kept for the next batch.

    More threads than cores collapse under contention. glibc returns blocks of 32 MB and more to the system at once, so
    each batch of 128x128 pictures would fault its pages in again: keeping them doubled the speed of PPO's update. Live
    it spares up to 150 page faults a frame.
    """
    import torch

    torch.set_num_threads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_mmap_threshold, m_trim_threshold = -3, -1  # malloc.h
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def prepare_worker() -> None:
    """``prepare_process`` of a process that multiprocessing has started, and that is to end with the one before it."""
    prepare_process()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
