"""What is asked of the C library and of PyTorch about memory on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import heap

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource, sys
from pretrain.distributed.world import World, read_rank
world = World(read_rank(None))
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
world.close()
"""


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(heap.HUGE_PAGES, "0")
    heap.use_huge_pages()
    assert os.environ[heap.HUGE_PAGES] == "0"
    monkeypatch.delenv(heap.HUGE_PAGES)
    heap.use_huge_pages()
    assert os.environ[heap.HUGE_PAGES] == "1"


@pytest.mark.skipif(
    not PAGES.exists() or "[madvise]" not in PAGES.read_text(),
    reason="this Linux gives huge pages to all programs or to none",
)
def test_a_process_of_a_run_has_its_tensors_in_huge_pages() -> None:
    """64 MiB are 16,384 small pages: 16,385 faults without the setting, 33 with it."""
    faults = {}
    for said in ("0", None):
        env = {name: value for name, value in os.environ.items() if name != heap.HUGE_PAGES}
        env |= {} if said is None else {heap.HUGE_PAGES: said}
        run = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
        faults[said] = int(run.stdout)
    assert faults["0"] > 16_000
    assert faults[None] < 4_000
