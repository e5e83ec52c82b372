"""What every test shares: quiet libraries, one thread, no network, no tracker."""

from __future__ import annotations

import os
import signal

# Set before torch or datasets are imported by any test module. One thread: the tests run two ranks on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("MASTER_ADDR", None)
# Under nohup SIGHUP is ignored, by what the tests start too, and tests that end a run by it would wait in vain.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
