"""More learned positions for a model in training: the trained rows of the table are copied to those that follow.

Until then the rows that follow are never read (:func:`pretrain.model.positions.learned_rows`), so the model computes
the same before and after; from here on each row is trained on its own. Weight decay has acted on those rows meanwhile,
which leaves no trace: they are overwritten. The optimizer's states are copied like the weights, or the new rows' first
steps would be those of a fresh optimizer among settled ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pretrain.engine.state import fragments
from pretrain.model.positions import POSITION_OFFSET

if TYPE_CHECKING:
    from pretrain.model.transformer import NystromformerLM


def tile_rows(table: torch.Tensor, trained: int, until: int) -> torch.Tensor:
    """A copy of a table (2 + P, width): position p in [trained, until) has the row of position p % trained.

    The two rows before position 0 stay as they are, as do those from ``until`` on.
    """
    positions = torch.arange(trained, until)
    out = table.clone()
    out[positions + POSITION_OFFSET] = table[positions % trained + POSITION_OFFSET]
    return out


def extend_positions(engine: Any, model: NystromformerLM, trained: int) -> None:
    """Copy ``trained`` learned positions to all that ``model.config.trained_positions`` calls trained now.

    In the float32 master weights and in every state that the optimizer has for each element, at any ZeRO stage;
    ``engine`` is DeepSpeed's. All processes must call it alike.
    """
    until = model.config.trained_positions
    table = model.embeddings.position_embeddings
    if table is None or until is None or until <= trained:
        return
    weight = cast(nn.Parameter, table.weight)
    for name in fragments.state_names(engine, weight):
        full = fragments.get_full(engine, weight, name)
        fragments.set_full(engine, weight, name, tile_rows(full, trained, until))
    fragments.sync_model_weights(engine)
