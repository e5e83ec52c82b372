"""The language model: embeddings, blocks, and the masked or causal head, in one class chosen by
``config.objective``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.batches import IGNORE
from data_pipeline.errors import UserError
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.self_attention import AttentionContext
from pretrain.model.compute import at_least_float32
from pretrain.model.config import STAGE_FIELDS, ModelConfig
from pretrain.model.decoding import DecodingCache
from pretrain.model.document_loss import document_loss_sum
from pretrain.model.flops import forward_flops_per_token
from pretrain.model.layers import Block, Embeddings, Head, reset_module
from pretrain.model.norms import build_norm

LOSS_CHUNK_ELEMENTS = 2**26
"""Logits held at a time where the loss has a z-loss or is a document's: 256 MiB in float32. More are computed in chunks
and again in the backward pass."""


LayerRunner = Callable[[nn.Module, Tensor, AttentionContext], Tensor]
"""Another way of computing ``layer(x, context)`` for a :class:`Block`."""


@dataclass(frozen=True)
class LMOutput:
    """What a forward pass returns."""

    logits: Tensor | None = None
    """(B, N, vocabulary); only without labels, and not when only ``hidden`` was asked for."""
    loss_sum: Tensor | None = None
    """Scalar, at least float32: SUM of the cross entropy (nats) over targets. The caller divides by the global
    count."""
    z_sum: Tensor | None = None
    """Scalar, at least float32: SUM over targets of the squared log-partition, of a model in training whose ``z_loss``
    is set. It is no part of ``loss_sum``."""
    document_sum: Tensor | None = None
    """Scalar, at least float32: the sum of :func:`~pretrain.model.document_loss.document_loss_sum`, of a model in
    training whose ``document_loss`` is set. It is no part of ``loss_sum``."""
    num_targets: Tensor | None = None
    """Scalar int64: labels that are not -100."""
    hidden: Tensor | None = None
    """(B, N, hidden): what the head reads."""


class NystromformerLM(nn.Module):
    """Masked encoder or causal decoder. Build it with :func:`build_model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UserError(
                "model.vocab_size is not set: give it, or take it from the tokenizer or the shards' manifest"
            )
        self.config = config
        self.run_layer: LayerRunner | None = None
        """How layers run in training mode, if not by calling them: whoever trains the model may set it, to compute a
        layer again in the backward pass or to run a compiled one. Evaluation and decoding never use it."""
        self.z_loss = False
        """Whether a forward pass with labels in training mode also returns ``z_sum``; whoever trains may set it."""
        self.document_loss = False
        """Whether it also returns ``document_sum``, which :meth:`document_sum` gives in evaluation too."""
        self.embeddings = Embeddings(config, config.vocab_size)
        self.layers = nn.ModuleList(Block(config.of_layer(number)) for number in range(config.num_layers))
        self.norm = build_norm(config) if config.norm == "pre" else None
        self.head = Head(config, config.vocab_size)
        if config.tie_embeddings:
            # One Parameter in two modules, each using it in its own forward: what ZeRO-3 asks of a tied weight.
            self.head.decoder.weight = self.embeddings.word_embeddings.weight
        self.reset_parameters()

    def set_positions(self, config: ModelConfig) -> None:
        """Compute from now on what ``config`` says; it may differ from the present one in :data:`STAGE_FIELDS` only.

        The forward pass reads ``self.config`` anew each time, so a compiled model notices and compiles again.
        """
        old, new = self.config.model_dump(), config.model_dump()
        other = sorted(key for key in old if key not in STAGE_FIELDS and old[key] != new[key])
        if other:
            raise ValueError(f"a model that is built cannot change {', '.join(other)}")
        self.config = config

    def reset_parameters(self) -> None:
        """Normal weights of ``init_std`` (but see ``residual_init``), zero biases, gains 1.

        A seed's weights are part of every published number. Earlier versions drew two matrices of each pre-norm block
        twice, so the generator is advanced by as many values.
        """
        for module in self.modules():
            if isinstance(module, Block) and self.config.norm == "pre":
                for linear in (module.attention.output, module.feed_forward.output):
                    nn.init.normal_(linear.weight)  # drawn again below
            reset_module(module, self.config)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        layout: Layout | None = None,
        hidden: bool = False,
        cache: DecodingCache | None = None,
    ) -> LMOutput:
        """Run the model.

        ``input_ids``: (B, N) int64. ``labels``: (B, N) int64, -100 where there is no target; never shifted here.
        ``layout``: padding and documents, default full rows. ``hidden``: also return the last hidden states and,
        without labels, skip the head. ``cache``: what the layers keep for decoding; see :mod:`pretrain.model.decoding`,
        which gives it.

        With labels the head runs on targets only and ``logits`` is None. A batch without any target gives a loss of 0
        that still reaches every parameter, so that ranks of a distributed run stay in step.
        """
        batch, length = input_ids.shape
        layout = layout or Layout.full(batch, length)
        if (layout.batch, layout.length) != (batch, length):
            raise ValueError(
                f"layout is for ({layout.batch}, {layout.length}) tokens, input_ids are ({batch}, {length})"
            )
        x = self.embeddings(input_ids, layout, self.config.trained_positions)
        plans = None if cache is None else cache.plans
        contexts = AttentionContext.by_layer(self.config, layout, x.device, x.dtype, plans)
        for number, (layer, context) in enumerate(zip(self.layers, contexts, strict=True)):
            if self.run_layer is not None and self.training and cache is None:
                x = self.run_layer(layer, x, context)
            else:
                x = layer(x, context, None if cache is None else cache.layers[number])
        if self.norm is not None:
            x = self.norm(x)
        states = x if hidden else None
        if labels is None:
            return LMOutput(logits=None if hidden else self.head(x), hidden=states)
        sums = self._loss_sum(x, labels, layout)
        loss_sum, z_sum = sums.unbind() if sums.ndim else (sums, None)
        known = labels != IGNORE
        return LMOutput(
            loss_sum=loss_sum,
            z_sum=z_sum,
            document_sum=self.document_sum(x, input_ids, labels, layout) if self.training else None,
            num_targets=known.sum(),
            hidden=states,
        )

    def document_sum(self, states: Tensor, input_ids: Tensor, labels: Tensor, layout: Layout) -> Tensor | None:
        """:attr:`LMOutput.document_sum` of a pass whose ``hidden`` is ``states``; None without the flag."""
        if not self.document_loss:
            return None
        known = labels != IGNORE
        masked = self.config.objective == "mlm"  # whose labels have what was masked; causal ones are the next tokens
        return document_loss_sum(
            states,
            torch.where(known, labels, input_ids) if masked else input_ids,
            known,
            layout,
            self.head.decoder,
            vocab_size=self.head.decoder.out_features,
            chunk_elements=LOSS_CHUNK_ELEMENTS,
        )

    def _loss_sum(self, x: Tensor, labels: Tensor, layout: Layout) -> Tensor:
        """The sum of the cross entropy, (); with ``z_loss`` in training also of the squared log-partition, (2,)."""
        # A causal model's full rows are (nearly) all targets: picking them out would only wait for the device.
        if self.config.objective == "clm" and layout.is_full:
            states, targets = x.flatten(0, 1), labels.flatten()
        else:
            chosen = labels != IGNORE
            states, targets = x[chosen], labels[chosen]
        if not (self.z_loss and self.training):
            return self.head(states, targets)
        # From the batch's shape and not from the targets: ZeRO-3 must gather the head equally often on every rank.
        chunks = -(-labels.numel() * self.head.decoder.out_features // LOSS_CHUNK_ELEMENTS)
        if chunks <= 1:
            return self._chunk_z_loss(states, targets)
        total = states.new_zeros((), dtype=at_least_float32(states.dtype))
        for part, target in zip(states.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
            total = total + checkpoint(self._chunk_z_loss, part, target, use_reentrant=False)
        return total

    def _chunk_z_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """The log-partition of a target is its cross entropy plus its logit: no second pass over the vocabulary, and
        nothing of its size is kept. (``gather`` would keep the logits.)"""
        logits = self.head(states)
        logits = logits.to(at_least_float32(logits.dtype))
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        known = targets != IGNORE
        own = logits[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)]
        return torch.stack([losses.sum(), ((losses + own).square() * known).sum()])

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Weights, a tied one counted once; without word and position tables if ``embeddings`` is False."""
        total = sum(_numel(p) for p in self.parameters())
        if embeddings:
            return total
        tables = [self.embeddings.word_embeddings, self.embeddings.position_embeddings]
        return total - sum(_numel(table.weight) for table in tables if table is not None)

    def flops_per_token(self, seq_len: int) -> float:
        """Forward floating-point operations per token at this length; see
        :func:`pretrain.model.flops.forward_flops_per_token`."""
        return forward_flops_per_token(self.config, seq_len)


def build_model(config: ModelConfig) -> NystromformerLM:
    """A freshly initialised model in float32 on the CPU, from torch's global random state.

    Raises :class:`UserError` if ``config.vocab_size`` is not set.
    """
    return NystromformerLM(config)


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor and this attribute
