"""What the model card and ``nystrom push`` agree on; apart, so that a push need not import what reads checkpoints."""

from __future__ import annotations

CARD = "README.md"
GATE_TAGS = {True: "validity-gate-passed", False: "validity-gate-failed", None: "validity-gate-not-run"}
"""One of these is among the card's tags, by the gate's verdict."""
UNKNOWN = "unknown"
"""The licence of a card that names none: an identifier of the hub."""
