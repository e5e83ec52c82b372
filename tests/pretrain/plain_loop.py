"""The command that ranks run, and a plain loop for each optimizer that it is compared with."""

from __future__ import annotations

from typing import Any

import torch
from training_case import EPS

from data_pipeline.errors import run_cli
from pretrain.config import OptimizerConfig

KINDS = ("adamw", "lion", "muon")
LEARNING_RATES = {"adamw": 0.01, "lion": 0.002, "muon": 0.01}


def optimizer_settings(kind: str, **more: Any) -> dict[str, Any]:
    """The block ``optimizer`` of a run in which clipping, decay and the groups show in the weights."""
    block = {"kind": kind, "lr": LEARNING_RATES[kind], "grad_clip": 0.5, "weight_decay": 0.3}
    return {**block, "decay_embeddings": False, **more}


def keep_rounding_small() -> None:
    """Runs in the ranks: Lion with a soft sign and Muon with matrices in float32, of the run as of its reference.

    sign() makes whole steps of 4e-3 of rounding errors of 1e-9 where a gradient is zero but for them, as a key bias's
    is: softmax does not see it. In bf16 Muon's matrices round the differences between orders of summation up to 1% of a
    step. Either would hide faults; the rules themselves are tested elsewhere as they are.
    """
    from pretrain.optim import muon

    muon.compute_dtype = lambda device: torch.float32
    torch.Tensor.bfloat16 = torch.Tensor.float  # type: ignore[method-assign]  # in PyTorch's Muon
    torch.Tensor.sign_ = lambda self: self.div_(self.abs().add_(EPS))  # type: ignore[method-assign]


def train(config: str) -> int:
    """Runs in the ranks: the command itself, see :func:`keep_rounding_small`."""
    from pretrain.cli import main

    keep_rounding_small()
    return run_cli(main, "nystrom train", ["--config", config])


def reference_optimizers(model: Any, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """PyTorch's own classes on whole tensors, with groups put together here; Lion is tested by itself."""
    from pretrain.optim.lion import Lion

    spared = ("bias", "norm.weight", "gamma_logit")
    decayed = {name: p for name, p in model.named_parameters() if not name.endswith(spared)}
    if not config.decay_embeddings:
        decayed = {name: p for name, p in decayed.items() if "embeddings" not in name}
    linear = {name: p for name, p in decayed.items() if name.startswith("layers") and p.ndim == 2}
    inner = linear if config.kind == "muon" else {}
    groups = [
        {"params": [p for name, p in decayed.items() if name not in inner], "weight_decay": config.weight_decay},
        {"params": [p for name, p in model.named_parameters() if name not in decayed], "weight_decay": 0.0},
    ]
    if config.kind == "lion":
        return [Lion(groups, lr=0.0, betas=config.betas)]
    adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    if config.kind == "adamw":
        return [adamw]
    muon = torch.optim.Muon(
        inner.values(), weight_decay=config.weight_decay, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def plain_loop(config: str, skip: list[int] | None = None) -> dict[str, Any]:
    """Runs in a rank: one process, whole batches, no DeepSpeed, nothing of the trainer; no step for batches ``skip``.

    Returns losses, gradient norms, and by name the last weights and their average over the steps.
    """
    from data_pipeline.batches.loader import TrainLoader
    from pretrain.config import load_config
    from pretrain.curriculum.plan import build_plan
    from pretrain.model import build_model
    from pretrain.model.attention.layout import Layout
    from pretrain.optim.schedule import learning_rate
    from pretrain.sources import open_sources

    keep_rounding_small()
    run = load_config(config)
    plan = build_plan(run)
    data = open_sources(run, plan)
    torch.manual_seed(run.seed)
    model = build_model(run.model.model_copy(update={"vocab_size": data.shards.vocab_size}))
    optimizers = reference_optimizers(model, run.optimizer)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    decay, losses, z_losses, document_losses, norms = run.optimizer.ema_decay or 0.0, [], [], [], []
    # What they are, test_z_loss.py and test_document_loss.py compare with the logits.
    model.z_loss, model.document_loss = run.z_loss > 0, run.document_loss > 0
    masking = run.data.masking.build()
    for number, batch in enumerate(
        TrainLoader(data, plan, objective=run.model.objective, seed=run.seed, masking=masking), 1
    ):
        tokens = batch.tokens_before + batch.tokens
        lr = learning_rate(tokens, total_tokens=plan.total_tokens, peak=run.optimizer.lr, schedule=run.schedule)
        model.zero_grad()
        layout = None if batch.document_ids is None else Layout.from_documents(batch.document_ids)
        out = model(batch.input_ids, labels=batch.labels, layout=layout)
        loss = out.loss_sum / out.num_targets
        z_loss = 0.0 if out.z_sum is None else run.z_loss * out.z_sum / out.num_targets
        document = 0.0 if out.document_sum is None else run.document_loss * out.document_sum / out.num_targets
        (loss + z_loss + document).backward()
        z_losses.append(float(z_loss))
        document_losses.append(float(document))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.grad_clip)))
        losses.append(float(loss))
        if number in (skip or []):
            continue
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for name, p in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return {
        "losses": losses,
        "z_losses": z_losses,
        "document_losses": document_losses,
        "norms": norms,
        "weights": weights,
        "average": {k: v.numpy() for k, v in average.items()},
    }
