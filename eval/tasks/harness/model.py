"""A causal checkpoint as the language model of EleutherAI's lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.shared.scoring import FORWARD_TOKENS, PART_TOKENS, run_parts, score
from eval.subject import Subject
from pretrain.model.attention.layout import Layout
from pretrain.model.generation import generate

OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}
"""What a task may say about the texts that are written; ``num_beams: 1`` and the like change nothing."""
Request = tuple[list[int], list[int]]  # context (not empty) and continuation, both token ids


class SubjectLM(TemplateLM):
    """Scores and continues text by a subject's model in windows of ``length`` tokens, the end of a document before it.

    The work is divided into ``parts``: the harness itself sees one process with all requests.
    """

    def __init__(self, subject: Subject, length: int, parts: Parts, seed: int = 0) -> None:
        super().__init__()
        self.subject = subject
        self.max_length = length
        self._parts = parts
        self._seed = seed
        self._tokenizer = subject.loaded.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end of a document, with which every document of the training stream begins."""
        return self._tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of requests."""
        return self._tokenizer.hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; no special token is added."""
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, as lm-eval has them where it has any of the continuation.

        A context of white space alone belongs to the continuation, and the end of a document stands before it. A choice
        that merges into its context leaves no token behind those of the context. It is encoded by itself, since a
        choice without tokens would always win.
        """
        kept = context.rstrip()
        if not kept:
            return [self.prefix_token_id], self.tok_encode(context + continuation)
        continuation = context[len(kept) :] + continuation
        before, whole = self.tok_encode(kept), self.tok_encode(kept + continuation)
        return before, whole[len(before) :] or self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(-nats, bool(greedy)) for nats, greedy in self._score(pairs, "loglikelihood")]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token once, in windows side by side."""
        pairs: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._score(pairs, "loglikelihood_rolling"), strict=True):
            totals[owner] -= nats
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, greedy unless the task says otherwise."""
        prompts = [self.tok_encode(request.args[0]) or [self.eot_token_id] for request in requests]
        options = [normalize_gen_kwargs(request.args[1]) for request in requests]
        return self._divided(
            "generate_until",
            [len(prompt) + option["max_gen_toks"] for prompt, option in zip(prompts, options, strict=True)],
            lambda chosen: [self._continue(prompts[i], options[i], i) for i in chosen],
        )

    def _continue(self, prompt: list[int], options: Any, number: int) -> str:
        new = options["max_gen_toks"]
        if new >= self.max_length:
            raise UserError(
                f"the task asks for {new} new tokens, which leaves no room for a prompt in a window of "
                f"{self.max_length}: raise --length, or lower max_gen_toks of the task"
            )
        others = [f"{k}: {v}" for k, v in options.items() if k not in OPTIONS and v not in (None, False, 1)]
        if others:
            raise UserError(
                f"generation_kwargs of the task have {', '.join(others)}, which nystrom eval does not know: leave it "
                "out, or have lm-eval load the model itself (nystrom convert to-hf)"
            )
        ids = generate(
            self.subject.model,
            prompt[-(self.max_length - new) :],
            max_new_tokens=new,
            temperature=options.get("temperature", 0.0),
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            repetition_penalty=options.get("repetition_penalty") or 1.0,
            seed=self._seed + number,
            stop_id=self.eot_token_id,
        )
        return postprocess_generated_text(self._tokenizer.decode(ids), options["until"], None)

    def _score(self, pairs: list[Request], kind: str) -> list[tuple[float, bool]]:
        """Nats of each continuation, and whether every token of it is the likeliest. Contexts are cut on the left."""
        rows: list[Request] = []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit a window of {self.max_length}: raise "
                    "--length"
                )
            kept = (context + continuation)[-(self.max_length + 1) :]
            rows.append((kept[:-1], continuation))
        return [
            (nats, greedy)
            for nats, greedy in self._divided(
                kind, [len(row) for row, _ in rows], lambda chosen: self._score_rows([rows[i] for i in chosen])
            )
        ]

    def _score_rows(self, rows: list[Request]) -> list[tuple[float, bool]]:
        """The same for rows of similar length, in as many forward passes as they need."""
        out: list[tuple[float, bool]] = []
        longest = max(len(row) for row, _ in rows)
        step = max(1, FORWARD_TOKENS // longest)
        for start in range(0, len(rows), step):
            batch = rows[start : start + step]
            width = max(len(row) for row, _ in batch)
            inputs = torch.full((len(batch), width), self.eot_token_id)
            chosen = torch.zeros(len(batch), width, dtype=torch.bool)
            for number, (row, continuation) in enumerate(batch):
                inputs[number, : len(row)] = torch.tensor(row)
                chosen[number, len(row) - len(continuation) : len(row)] = True
            layout = Layout.from_lengths([len(row) for row, _ in batch], width)
            goal = torch.tensor([token for _, continuation in batch for token in continuation], dtype=torch.int64)
            nats, hits = score(self.subject, inputs, chosen, goal, layout)
            place = 0
            for _, continuation in batch:
                mine = slice(place, place + len(continuation))
                out.append((float(nats[mine].sum()), bool(hits[mine].all())))
                place += len(continuation)
        return out

    def _divided(self, kind: str, sizes: list[int], work: Callable[[list[int]], list[Any]]) -> list[Any]:
        """``work`` on the requests by falling size, cut into parts of about as many tokens; in the old order."""
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        groups: list[list[int]] = []
        tokens = PART_TOKENS
        for i in order:
            if tokens >= PART_TOKENS:
                groups.append([])
                tokens = 0
            groups[-1].append(i)
            tokens += sizes[i]
        jobs = [(f"{kind} {n + 1} of {len(groups)}", partial(work, group)) for n, group in enumerate(groups)]
        answers: list[Any] = [None] * len(sizes)
        for group, values in zip(groups, run_parts(self._parts, jobs, kind), strict=True):
            for i, value in zip(group, values, strict=True):
                answers[i] = value
        return answers
