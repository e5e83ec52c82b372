"""A checkpoint for Python programs: its texts, probabilities and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.html import html_facts
from eval.shared.pooling import Pooling, check_pooling
from eval.shared.scoring import rows_of, score
from eval.shell.masks import Candidate, fill
from eval.shell.texts import Given
from eval.shell.writing import Decoding, Writer
from eval.subject import Subject, choose_device, choose_precision
from eval.tasks.embedding.embed import Floats, as_tokens, embed

if TYPE_CHECKING:
    from data_pipeline.tokenization.tokenizer import Tokenizer
    from pretrain.config import RunConfig
    from pretrain.model.transformer import NystromformerLM

Precision = Literal["fp32", "bf16", "auto"]


class Sampling(TypedDict, total=False):
    """The options of :meth:`Model.generate`, for type checkers and editors."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    beams: int
    length_penalty: float
    stop: str | Sequence[str]
    seed: int
    batch_size: int


class Model:
    """The weights of a run, a checkpoint or an export, in evaluation mode on a device.

    ``network`` is the PyTorch module. Every mistake of the caller's raises :class:`UserError`.
    """

    def __init__(self, subject: Subject) -> None:
        """See :meth:`open`."""
        self.subject = subject

    @classmethod
    def open(cls, path: str | Path, device: str = "auto", precision: Precision = "fp32") -> Model:
        """Load a run folder (its newest checkpoint), one of its checkpoints, or an export folder.

        ``device``: "auto" is a GPU where there is one. ``precision``: of weights and computation, "auto" for bf16
        where the device is fast at it. Raises :class:`UserError` for what is not there, is not whole, or is of another
        library, and for a device that cannot be used.
        """
        from pretrain.checkpoint.load import load_model

        if precision not in ("fp32", "bf16", "auto"):
            raise UserError(f"precision {precision!r}: choose fp32, bf16 or auto")
        chosen = choose_device(device)
        with torch.random.fork_rng(devices=[]):  # the network draws weights before it gets its own
            loaded = load_model(path)
        bf16 = choose_precision(precision, chosen) == "bf16"
        loaded.model.to(device=chosen, dtype=torch.bfloat16 if bf16 else torch.float32).eval()
        return cls(Subject(loaded, None, chosen))

    @property
    def network(self) -> NystromformerLM:
        """The PyTorch module. ``network(ids)`` of ids (B, N) int64 has ``logits`` (B, N, V)."""
        network: NystromformerLM = self.subject.model
        return network

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data that it was trained on."""
        return self.subject.loaded.tokenizer

    @property
    def config(self) -> RunConfig:
        """The configuration of its run; ``config.model`` is the network's, as the file has it."""
        return self.subject.loaded.run_config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.subject.device

    @property
    def path(self) -> Path:
        """The folder that was loaded."""
        return self.subject.loaded.path

    @overload
    def generate(  # type: ignore[overload-overlap] # a str is a sequence of str too: it comes first
        self, prompts: str, **sampling: Unpack[Sampling]
    ) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **sampling: Unpack[Sampling]) -> list[str]: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        beams: int = 0,
        length_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        batch_size: int = 1,
    ) -> str | list[str]:
        """The continuation of a prompt, or of each of several, without the prompt; an empty one begins a document.

        ``temperature`` 0 takes the likeliest token, ``beams`` above 0 is a beam search, ``stop`` are texts that end a
        continuation. Prompt i draws with the seed ``seed + i``. Raises :class:`UserError` for a masked model, settings
        out of range, and a prompt longer than the learned positions.
        """
        if not self.subject.causal:
            raise UserError(f"{self.path} is a masked model (objective: mlm), which continues no text: use fill")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        given = _given(prompts, "prompt")
        decoding = Decoding(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            beams=beams,
            length_penalty=length_penalty,
            stops=(stop,) if isinstance(stop, str) else tuple(stop),
            seed=seed,
        )
        writer = Writer(self.subject, decoding)
        texts = [one.text for rows in writer.batches(given, batch_size) for one in writer.write(rows)]
        return texts[0] if isinstance(prompts, str) else texts

    def fill(self, text: str, top: int = 5) -> list[list[Candidate]]:
        """For each mask of a text (``[MASK]``, ``<mask>``) its ``top`` likeliest tokens, the likeliest first.

        A candidate has ``token``, ``id`` and ``probability``; each mask is filled by itself. Raises
        :class:`UserError` for a causal model, and a text without a mask or longer than the learned positions.
        """
        if self.subject.causal:
            raise UserError(f"{self.path} is a causal model (objective: clm), which fills no masks: use generate")
        if top < 1:
            raise UserError(f"top must be at least 1, got {top}")
        [given] = _given(text, "text")
        return fill(self.subject, given, top).masks

    def logits(self, text: str) -> Tensor:
        """Logits (N, V) in float32 at each of the N tokens of a text, on the model's device.

        A causal model's row i is about token i + 1, a masked model's about token i. Raises :class:`UserError` for a
        text without a token or longer than the learned positions.
        """
        return self.subject.logits(torch.tensor([self._ids(text)]))[0]

    @torch.inference_mode()
    def hidden_states(self, text: str) -> Tensor:
        """The last layer's hidden states (N, H) in float32 at each of the N tokens of a text, on the model's device.

        ``logits`` are computed from them, and ``embed`` pools them. ``model.tokenizer.encode(text)`` has the N ids.
        Raises as :meth:`logits` does.
        """
        ids = torch.tensor([self._ids(text)], device=self.device)
        hidden: Tensor = self.network(ids, hidden=True).hidden
        return hidden[0].float()

    def log_likelihood(self, text: str) -> float:
        """log p of a text in nats, summed over its tokens.

        Causal: the first token follows the end-of-text token, as at the beginning of a document. Masked: the
        pseudo-log-likelihood of Salazar et al. (2020), each token masked in turn given all others. It takes a forward
        pass for each token and compares masked models of one tokenizer only. Raises as :meth:`logits` does.
        """
        ids = torch.tensor(self._ids(text))
        count = len(ids)
        if self.subject.causal:
            inputs = torch.cat([torch.tensor([self.tokenizer.eos_id]), ids[:-1]])[None]
            nats, _ = score(self.subject, inputs, torch.ones_like(inputs, dtype=torch.bool), ids)
            return -float(nats.sum())
        mask_id = self.tokenizer.mask_id
        assert mask_id is not None  # without one a masked model is not loaded
        total = 0.0
        for places in torch.arange(count).split(rows_of(count)):
            rows = torch.arange(len(places))
            inputs, chosen = ids.repeat(len(places), 1), torch.zeros(len(places), count, dtype=torch.bool)
            inputs[rows, places], chosen[rows, places] = mask_id, True
            nats, _ = score(self.subject, inputs, chosen, ids[places])
            total -= float(nats.sum())
        return total

    def embed(
        self, texts: str | Sequence[str], *, pooling: Pooling = "mean", max_length: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """A vector for each text, (n, hidden_size), or (hidden_size,) of a single one: pooled hidden states.

        ``pooling``: "mean" of the tokens, "cls" the first, "last" the last. At most ``max_length`` tokens of each are
        read, left out: the longest length of the training. Raises :class:`UserError` for a text without a token, and
        for "cls" of a causal model.
        """
        if pooling not in ("mean", "cls", "last"):
            raise UserError(f"pooling {pooling!r}: choose mean, cls or last")
        check_pooling(pooling, self.subject.causal)
        length = self.subject.trained_length if max_length is None else max_length
        if length < 1:
            raise UserError(f"max_length must be at least 1, got {length}")
        limit = self.network.config.max_positions if self.network.config.positions == "learned" else length
        given = [one.text for one in _given(texts, "text")]
        if not given:
            return np.zeros((0, self.network.config.hidden_size))
        tokens = as_tokens(self.tokenizer, given, min(length, limit), "embed").tokens
        vectors: Floats = embed(
            self.network, tokens, pooling, micro_tokens=8192, pad_id=self.tokenizer.pad_id or self.tokenizer.eos_id
        )
        return vectors[0] if isinstance(texts, str) else vectors

    def _ids(self, text: str) -> list[int]:
        [given] = _given(text, "text")
        ids = self.tokenizer.encode(given.text)
        config = self.subject.loaded.model_config
        if not ids:
            raise UserError(f"the text {text!r} has no token: give one with words")
        if config.positions == "learned" and len(ids) > config.max_positions:
            raise UserError(
                f"a text of {len(ids)} tokens is longer than the {config.max_positions} learned positions of the model "
                "(model.max_positions): shorten it"
            )
        return ids

    def __repr__(self) -> str:
        info = self.subject.info()
        return (
            f"Model({str(self.path)!r}: {info.objective}, {info.attention} attention, {info.parameters:,} parameters, "
            f"{info.tokens:,} tokens seen, on {self.device})"
        )

    def _repr_html_(self) -> str:
        info, network = self.subject.info(), self.subject.loaded.model_config
        facts: list[tuple[str, object]] = [
            ("folder", self.path),
            ("objective", {"clm": "causal (clm)", "mlm": "masked (mlm)"}.get(info.objective, info.objective)),
            ("attention", info.attention),
            ("layers, hidden size, heads", f"{network.num_layers}, {network.hidden_size}, {network.num_heads}"),
            ("parameters", info.parameters),
            ("vocabulary", network.vocab_size),
            ("tokens seen", info.tokens),
            ("weights", info.weights_hash[:12]),
            (
                "device, precision",
                f"{self.device}, {str(next(self.network.parameters()).dtype).removeprefix('torch.')}",
            ),
        ]
        return html_facts(f"Model {info.run}", facts)


def _given(texts: str | Sequence[str], what: str) -> list[Given]:
    """The texts with their names for messages; raises :class:`UserError` for what is no text."""
    several = not isinstance(texts, str)
    found = []
    for number, text in enumerate(texts if several else [texts]):
        where = f"{what} {number}" if several else what
        if not isinstance(text, str):
            raise UserError(f"{where} is {type(text).__name__}, not str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: half a surrogate pair at character {error.start + 1}, not Unicode text"
            ) from None
        found.append(Given(text, where))
    return found
