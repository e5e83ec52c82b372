"""The command that ranks run, and the reference that it is compared with."""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import run_cli


def train(config: str) -> int:
    """Runs in the ranks: the command itself."""
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config])


def plain_loop(config: str, skip: list[int] | None = None) -> dict[str, Any]:
    """Runs in a rank: the reference. One process, whole batches, no DeepSpeed, nothing of the trainer."""
    import torch

    from data_pipeline.batches.loader import TrainLoader
    from pretrain.config import load_config
    from pretrain.curriculum.plan import build_plan
    from pretrain.model import build_model
    from pretrain.model.attention.layout import Layout
    from pretrain.optim.schedule import learning_rate
    from pretrain.sources import open_sources

    run = load_config(config)
    plan = build_plan(run)
    data = open_sources(run, plan)
    torch.manual_seed(run.seed)
    model = build_model(run.model.model_copy(update={"vocab_size": data.shards.vocab_size}))
    decay = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": run.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=run.optimizer.betas,
        eps=run.optimizer.eps,
    )
    losses, norms = [], []
    masking = run.data.masking.build()
    for number, batch in enumerate(
        TrainLoader(data, plan, objective=run.model.objective, seed=run.seed, masking=masking), 1
    ):
        tokens = batch.tokens_before + batch.tokens
        lr = learning_rate(tokens, total_tokens=plan.total_tokens, peak=run.optimizer.lr, schedule=run.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        layout = None if batch.document_ids is None else Layout.from_documents(batch.document_ids)
        out = model(batch.input_ids, labels=batch.labels, layout=layout)
        loss = out.loss_sum / out.num_targets
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.grad_clip)))
        losses.append(float(loss))
        if number not in (skip or []):
            optimizer.step()
    return {"losses": losses, "norms": norms, "weights": {k: v.numpy() for k, v in model.state_dict().items()}}
