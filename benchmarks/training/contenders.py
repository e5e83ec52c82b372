"""The same training by our trainer and by a plain loop, each in a process that steps when it is told to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.turns import TurnTaker, serve_run


@dataclass(frozen=True)
class Contender:
    """A way to run the same steps."""

    name: str
    precision: str
    zero_stage: int | None  # None: the plain loop

    @property
    def title(self) -> str:
        """For tables."""
        return f"plain PyTorch, {self.precision}" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"


PLAIN = (Contender("plain-fp32", "fp32", None), Contender("plain-bf16", "bf16", None))
OURS = (
    *(Contender(f"zero{stage}-fp32", "fp32", stage) for stage in (0, 1, 2, 3)),
    *(Contender(f"zero{stage}-bf16", "bf16", stage) for stage in (1, 2, 3)),
)
CONTENDERS = {contender.name: contender for contender in (*PLAIN, *OURS)}


def serve(raw: dict[str, Any], taker: TurnTaker) -> None:
    """Runs in a process of its own."""
    contender = CONTENDERS[raw["name"]]
    if contender.zero_stage is None:
        plain_loop({**raw, "precision": contender.precision, "zero_stage": 1}, taker)
    else:
        serve_run({**raw, "precision": contender.precision, "zero_stage": contender.zero_stage}, taker)


def plain_loop(raw: dict[str, Any], taker: TurnTaker) -> None:
    """The loop that one would write: the same rows, micro-batches, AdamW, clipping; bf16 by autocast.

    Autocast keeps the weights in float32, as ZeRO's 16-bit modes do beside theirs; weights in bfloat16 alone train
    worse. The loss is read once a step.
    """
    import contextlib

    import torch

    from data_pipeline.batches import IGNORE
    from data_pipeline.batches.loader import TrainLoader
    from pretrain.checks import check_inputs
    from pretrain.config import parse_config
    from pretrain.curriculum.plan import micro_batches
    from pretrain.model.transformer import build_model
    from pretrain.optim.optimizer import build_optimizer, set_learning_rate
    from pretrain.optim.schedule import learning_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = check_inputs(parse_config(raw), 1)
    config, plan = inputs.config, inputs.plan
    torch.manual_seed(config.seed)
    model = build_model(config.model).to(device)
    optimizer = build_optimizer(model, config.optimizer)
    rows = config.curriculum[0].micro_batch
    cast: Any = contextlib.nullcontext()
    if config.precision == "bf16":
        cast = torch.autocast(device.type, torch.bfloat16)
    masking = config.data.masking.build()
    loader = TrainLoader(inputs.train, plan, objective=config.model.objective, seed=config.seed, masking=masking)
    taker.begin()
    for batch in loader:
        input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
        targets = max(int((batch.labels != IGNORE).sum()), 1)
        total = torch.zeros((), device=device)
        for part in micro_batches(len(input_ids), rows):
            with cast:
                loss = model(input_ids[part], labels=labels[part]).loss_sum / targets
            loss.backward()
            total += loss.detach()
        tokens = batch.tokens_before + batch.tokens
        lr = learning_rate(tokens, total_tokens=plan.total_tokens, peak=config.optimizer.lr, schedule=config.schedule)
        set_learning_rate(optimizer, lr)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        float(total)
        taker.step_done()
