"""Nyströmformer language models as transformers' classes.

Right with padding on either side, in float32, bfloat16 and float16, and at every length. A row's result depends on its
own tokens alone: padding and batch mates change nothing. Attention masks must be 2-D with one run of ones in each row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from pretrain.convert.carried.cache_nystrom import NystromCache
from pretrain.convert.carried.configuration_nystrom import NystromConfig
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.self_attention import AttentionContext
from pretrain.model.compute import at_least_float32
from pretrain.model.decoding import DecodingCache
from pretrain.model.layers import Block, Embeddings, Head, reset_module
from pretrain.model.norms import build_norm

IGNORE = -100
"""Label of a position without a target."""


def layout_of(input_ids: Tensor, attention_mask: Tensor | None) -> Layout:
    """Which tokens of (B, N) ids are real. Raises ValueError for a mask of another shape or with holes."""
    rows, length = input_ids.shape
    if attention_mask is None:
        return Layout.full(rows, length)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, and input_ids {tuple(input_ids.shape)}: give "
            "a 2-D mask with 1 on real tokens"
        )
    real = attention_mask.bool().cpu()
    layout = Layout.from_documents(torch.where(real, 0, -1))
    if layout.starts is not None:
        row = layout.starts // max(length, 1)
        if len(np.unique(row)) < len(row):
            raise ValueError("attention_mask has holes: each row must be one run of 1 with padding before or after it")
    return layout


class NystromPreTrainedModel(PreTrainedModel):
    """What all of them share."""

    config_class = NystromConfig
    config: NystromConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers reads them from the class

    def _init_weights(self, module: nn.Module) -> None:
        reset_module(module, self.config.model_config())

    def get_input_embeddings(self) -> nn.Module:
        return self._backbone.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._backbone.embeddings.word_embeddings = value  # type: ignore[assignment]

    @property
    def _backbone(self) -> NystromModel:
        return self if isinstance(self, NystromModel) else self.model


class NystromModel(NystromPreTrainedModel):
    """Embeddings and layers: the last hidden states."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012

    def __init__(self, config: NystromConfig) -> None:
        super().__init__(config)
        self.network = config.model_config()
        self.embeddings = Embeddings(self.network, config.vocab_size)
        self.layers = nn.ModuleList(Block(self.network.of_layer(i)) for i in range(self.network.num_layers))
        self.norm = build_norm(self.network) if self.network.norm == "pre" else None
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: NystromCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """input_ids (B, N) int64; attention_mask (B, N), 1 on real tokens, default all.

        ``past_key_values``: of an earlier pass; ``input_ids`` are then the tokens that follow, and the mask is not
        read. ``use_cache`` alone makes one for twice the tokens; ``NystromCache(max_length)`` chooses the size.
        """
        for name in ("inputs_embeds", "head_mask", "encoder_hidden_states"):
            if unused.get(name) is not None:
                raise ValueError(f"{name} is not supported: give input_ids")
        if unused.get("output_attentions"):
            raise ValueError("output_attentions is not supported: no layer forms the N x N matrix")
        if input_ids is None:
            raise ValueError("give input_ids")
        if past_key_values is not None and not isinstance(past_key_values, NystromCache):
            raise ValueError(f"past_key_values must be a NystromCache, not {type(past_key_values).__name__}")
        if past_key_values is None and use_cache and self.network.objective == "clm":
            past_key_values = NystromCache(2 * input_ids.shape[1])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] | None = [] if output_hidden_states else None
        if past_key_values is not None:
            hidden = self._with_cache(input_ids, attention_mask, past_key_values, states)
        else:
            hidden = self._pass(input_ids, layout_of(input_ids, attention_mask), None, states)
        out = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=None if states is None else (*states, hidden),
        )
        return out if return_dict is not False else out.to_tuple()

    def _with_cache(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: NystromCache, states: list[Tensor] | None
    ) -> Tensor:
        """Prompts in one pass; further tokens one by one, however many are given."""
        if torch.is_grad_enabled() and self.training:
            raise ValueError("a cache is for generation: train with use_cache=False")
        with torch.no_grad():
            if cache.state is None:
                layout = layout_of(input_ids, attention_mask)
                if attention_mask is not None and not bool(attention_mask[:, -1].all()):
                    raise ValueError("prompts are padded on the right: pad them on the left (padding_side='left')")
                state = cache.begin(self.network, layout, self.embeddings.word_embeddings.weight.dtype, self.device)
                hidden = self._pass(input_ids, layout, state, states)
            else:
                steps = []
                for column in input_ids.unbind(1):
                    steps.append(self._pass(column[:, None], cache.state.next_step(), cache.state, None))
                    cache.state.advance()
                hidden = torch.cat(steps, dim=1)
        cache.columns += input_ids.shape[1]
        return hidden

    def _pass(
        self, input_ids: Tensor, layout: Layout, cache: DecodingCache | None, states: list[Tensor] | None
    ) -> Tensor:
        x = self.embeddings(input_ids, layout, self.network.trained_positions)
        plans = None if cache is None else cache.plans
        contexts = AttentionContext.by_layer(self.network, layout, x.device, x.dtype, plans)
        for number, (layer, context) in enumerate(zip(self.layers, contexts, strict=True)):
            if states is not None:
                states.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer, x, context)
            else:
                x = layer(x, context, None if cache is None else cache.layers[number])
        return x if self.norm is None else self.norm(x)


class _WithHead(NystromPreTrainedModel):
    accepts_loss_kwargs = True
    _tied_weights_keys = {  # noqa: RUF012
        "head.decoder.weight": "model.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: NystromConfig) -> None:
        super().__init__(config)
        self._check(config)
        self.model = NystromModel(config)
        self.head = Head(self.model.network, config.vocab_size)
        self.post_init()

    def _check(self, config: NystromConfig) -> None:
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head.decoder = value  # type: ignore[assignment]


class NystromForMaskedLM(_WithHead):
    """The masked model, with its head."""

    def _check(self, config: NystromConfig) -> None:
        if config.objective != "mlm":
            raise ValueError("this model is causal (objective: clm): load it with AutoModelForCausalLM")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unused: Any,
    ) -> Any:
        """labels (B, N): -100 where there is no target; the loss is the mean over targets."""
        out = self.model(input_ids, attention_mask, output_hidden_states=output_hidden_states, **unused)
        logits = self.head(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = _mean_loss(logits, labels, num_items_in_batch)
        result = MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return result if return_dict is not False else result.to_tuple()


class NystromForCausalLM(_WithHead, GenerationMixin):
    """The causal model. ``generate`` decodes with the model's own cache, of constant size but for the landmarks."""

    def _check(self, config: NystromConfig) -> None:
        if config.objective != "clm":
            raise ValueError("this model is masked (objective: mlm): load it with AutoModelForMaskedLM")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: NystromCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **unused: Any,
    ) -> Any:
        """labels (B, N) are shifted here: the target of position i is ``labels[:, i + 1]``; -100 for none."""
        out = self.model(
            input_ids,
            attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **unused,
        )
        hidden = out.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = _mean_loss(logits, F.pad(labels, (0, 1), value=IGNORE)[:, 1:], num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return result if return_dict is not False else result.to_tuple()

    def _prepare_cache_for_generation(  # type: ignore[override]  # its arguments differ between versions
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """``generate`` asks for the cache here, when it knows how long the texts may get."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model has a cache of its own"
            )
        if generation_config.use_cache is False or model_kwargs.get("past_key_values") is not None:
            return
        model_kwargs["past_key_values"] = NystromCache(generation_config.max_length)


class _Classifier(NystromPreTrainedModel):
    accepts_loss_kwargs = False

    def __init__(self, config: NystromConfig) -> None:
        super().__init__(config)
        self.model = NystromModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 2)
        self.post_init()


class NystromForSequenceClassification(_Classifier):
    """A linear layer on pooled states: their mean over real tokens, or the last one's (``classifier_pooling``)."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """labels (B,): classes; numbers where there is one label (regression); (B, labels) for several at once."""
        out = self.model(input_ids, attention_mask, output_hidden_states=output_hidden_states, **unused)
        hidden = out.last_hidden_state
        real = torch.ones(hidden.shape[:2], device=hidden.device) if attention_mask is None else attention_mask
        logits = self.classifier(self.dropout(pool(hidden, real.bool(), self.config.classifier_pooling)))
        loss = None
        if labels is not None:
            kind = self.config.problem_type or _problem(self.classifier.out_features, labels)
            exact = _exact(logits)
            if kind == "regression":
                loss = F.mse_loss(exact, labels.to(exact).view_as(exact))
            elif kind == "single_label_classification":
                loss = F.cross_entropy(exact, labels.flatten())
            else:
                loss = F.binary_cross_entropy_with_logits(exact, labels.to(exact))
        result = SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return result if return_dict is not False else result.to_tuple()


class NystromForTokenClassification(_Classifier):
    """A linear layer on the state of each token."""

    accepts_loss_kwargs = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unused: Any,
    ) -> Any:
        """labels (B, N): -100 where there is none."""
        out = self.model(input_ids, attention_mask, output_hidden_states=output_hidden_states, **unused)
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = None if labels is None else _mean_loss(logits, labels, num_items_in_batch)
        result = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return result if return_dict is not False else result.to_tuple()


def pool(hidden: Tensor, real: Tensor, pooling: str) -> Tensor:
    """(B, N, h) and (B, N) bool -> (B, h): the mean over real tokens, or the state of the first or last of them."""
    if pooling == "mean":
        return (_exact(hidden) * real[..., None]).sum(1).div(real.sum(1).clamp(min=1)[:, None]).to(hidden.dtype)
    if pooling not in ("first", "last"):
        raise ValueError(f"classifier_pooling {pooling!r} is not known: mean, first or last")
    places = torch.arange(hidden.shape[1], device=hidden.device)
    at = torch.where(real, places, -1).amax(1) if pooling == "last" else torch.where(real, places, len(places)).amin(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), at]


def _problem(labels: int, given: Tensor) -> str:
    if labels == 1:
        return "regression"
    return "multi_label_classification" if given.is_floating_point() else "single_label_classification"


def _exact(x: Tensor) -> Tensor:
    """In float32, or float64 if it is: for sums and losses."""
    return x.to(at_least_float32(x.dtype))


def _mean_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """Cross entropy in nats over the targets, in float32 at least; ``count``: of all targets of an optimizer step."""
    targets = labels.to(logits.device).flatten()
    total = F.cross_entropy(_exact(logits).flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
    return total / (count if count is not None else (targets != IGNORE).sum().clamp(min=1))
