"""What is timed: one model's passes over sequences of one length, and its decoding behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from data_pipeline.batches import IGNORE
from pretrain.model.attention.layout import Layout
from pretrain.model.decoding import DecodingCache, decode, prefill
from pretrain.model.transformer import NystromformerLM

FORWARD, BACKWARD, DECODE = "forward", "forward and backward", "decoding"
TARGETS = 0.15
"""Share of a masked model's tokens that are targets of a training pass."""


def tokens(model: NystromformerLM, sequences: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random ``input_ids`` and labels (B, n) on the model's device: the next token, or some of the tokens. Time and
    memory do not depend on which tokens they are."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.head.decoder.out_features
    drawn = torch.randint(0, vocabulary, (sequences, length + 1), generator=generator)
    inputs, labels = drawn[:, :-1], drawn[:, 1:]
    if model.config.objective == "mlm":
        labels = inputs.masked_fill(torch.rand(inputs.shape, generator=generator) >= TARGETS, IGNORE)
    device = model.embeddings.word_embeddings.weight.device
    return inputs.to(device), labels.to(device)


def forward(model: NystromformerLM, inputs: Tensor) -> Callable[[], object]:
    """All layers over full sequences, without the head: encoding, or reading a prompt."""
    layout = Layout.full(*inputs.shape)

    @torch.inference_mode()
    def work() -> object:
        return model(inputs, layout=layout, hidden=True).hidden

    return work


def backward(model: NystromformerLM, inputs: Tensor, labels: Tensor) -> Callable[[], object]:
    """The loss of all targets, head included, and the gradients of all weights; no optimizer."""
    layout = Layout.full(*inputs.shape)
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def work() -> object:
        loss = model(inputs, labels=labels, layout=layout).loss_sum
        return torch.autograd.grad(loss, weights)

    return work


class Decoding:
    """Texts that grow: each call appends some tokens to each, one step of the model after the other."""

    def __init__(self, model: NystromformerLM, prompt: Tensor, per_call: int, max_length: int) -> None:
        self.model = model
        self.per_call = per_call
        self.cache: DecodingCache
        logits, self.cache = prefill(model, prompt, max_length=max_length)
        self.next = logits.argmax(-1)

    def __call__(self) -> Tensor:
        """The last tokens (B,)."""
        for _ in range(self.per_call):
            self.next = decode(self.model, self.next, self.cache).argmax(-1)
        return self.next


def out_of_memory(error: RuntimeError) -> bool:
    """Whether that is why it was raised, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def warm(cases: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Run each case once; those for which there is memory enough."""
    kept = {}
    for name, work in cases.items():
        try:
            work()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            continue
        kept[name] = work
    return kept
