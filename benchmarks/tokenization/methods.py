"""The competitors, each run in a process of its own: ``python -m benchmarks.tokenization.methods NAME ...``.

A method reads the JSONL files of a folder, leaves the tokens of every document on disk (the bare tokenizer leaves
nothing) and returns how many there were. What is timed is the call, not the start of Python and the imports.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.processes import kill_forks_with_parent

CONTEXT = 1024  # length of the rows that the run_mlm recipe makes


def bare(corpus: Path, tokenizer: Path, out: Path, workers: int) -> tuple[float, int]:
    """``encode_batch_fast`` on texts in memory, by its own threads; nothing is read or written."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    backend.encode_special_tokens = True
    texts = [json.loads(line)["text"] for file in _files(corpus) for line in file.read_bytes().splitlines()]
    started = time.perf_counter()
    tokens = 0
    for first in range(0, len(texts), 256):
        encodings = backend.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
        tokens += sum(len(encoding) for encoding in encodings)
    return time.perf_counter() - started, tokens


def ours(backend: str) -> Callable[[Path, Path, Path, int], tuple[float, int]]:
    """``nystrom data prepare --backend BACKEND``: checksummed, crash-safe shards."""

    def method(corpus: Path, tokenizer: Path, out: Path, workers: int) -> tuple[float, int]:
        from data_pipeline.prepare.plan import plan_preparation
        from data_pipeline.prepare.run import PrepareOptions, prepare
        from data_pipeline.sources.corpus import open_corpus
        from data_pipeline.tokenization.tokenizer import Tokenizer

        started = time.perf_counter()
        preparation = plan_preparation(open_corpus([corpus]), Tokenizer.load(tokenizer))
        outcome = prepare(preparation, out, PrepareOptions(workers=workers, backend=backend))
        assert outcome.shards is not None
        return time.perf_counter() - started, outcome.shards.num_tokens - outcome.shards.num_documents

    return method


def datasets_map(corpus: Path, tokenizer: Path, out: Path, workers: int) -> tuple[float, int]:
    """The recipe of transformers' run_mlm.py: ``map`` to ids, ``map`` to rows of 1,024."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    started = time.perf_counter()
    data = datasets.load_dataset(
        "json", data_files=[str(file) for file in _files(corpus)], split="train", cache_dir=str(out)
    )

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": fast(batch["text"], add_special_tokens=False)["input_ids"]}

    def group(batch: dict[str, Any]) -> dict[str, Any]:
        flat = [token for ids in batch["input_ids"] for token in ids]
        return {"input_ids": [flat[i : i + CONTEXT] for i in range(0, len(flat), CONTEXT)]}

    encoded = data.map(encode, batched=True, num_proc=workers, remove_columns=data.column_names)
    rows = encoded.map(group, batched=True, num_proc=workers)
    seconds = time.perf_counter() - started
    return seconds, sum(len(ids) for ids in rows["input_ids"])


def datatrove(corpus: Path, tokenizer: Path, out: Path, workers: int) -> tuple[float, int]:
    """datatrove's DocumentTokenizer without shuffling."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    started = time.perf_counter()
    LocalPipelineExecutor(
        [
            JsonlReader(str(corpus)),
            DocumentTokenizer(
                str(out / "ds"),
                str(tokenizer / "tokenizer.json"),
                eos_token="</s>",
                shuffle_documents=False,
            ),
        ],
        tasks=workers,
        workers=workers,
        logging_dir=str(out / "logs"),
    ).run()
    seconds = time.perf_counter() - started
    documents = sum(file.read_bytes().count(b"\n") for file in _files(corpus))
    return seconds, sum(file.stat().st_size for file in (out / "ds").glob("*.ds")) // 2 - documents


METHODS: dict[str, Callable[[Path, Path, Path, int], tuple[float, int]]] = {
    "bare": bare,
    "ours": ours("tokenizers"),
    "ours-tiktoken": ours("tiktoken"),
    "datasets": datasets_map,
    "datatrove": datatrove,
}
TITLES = {
    "bare": "`encode_batch_fast`, nothing read or written",
    "ours": "ours, stock backend",
    "ours-tiktoken": "ours, tiktoken backend",
    "datasets": "`datasets.map` + group_texts",
    "datatrove": "datatrove DocumentTokenizer",
}
NEEDS = {"ours-tiktoken": "tiktoken", "datasets": "transformers", "datatrove": "datatrove"}


def _files(corpus: Path) -> list[Path]:
    return sorted(corpus.glob("*.jsonl"))


def main() -> None:
    """Run one method and print its seconds and tokens as JSON."""
    name, corpus, tokenizer, out, workers = sys.argv[1:]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    kill_forks_with_parent()
    seconds, tokens = METHODS[name](Path(corpus), Path(tokenizer), Path(out), int(workers))
    print(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
