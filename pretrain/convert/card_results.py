"""The model card's sections on results and validity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from pretrain.convert.markdown import code, listed, number, table
from pretrain.convert.run_record import RunRecord, Verdict

MEANINGS = {
    "loss": "nats per token",
    "perplexity": "exp of the loss per token",
    "bits_per_byte": "loss in bits per byte of text",
    "byte_perplexity": "exp of the loss per byte",
    "word_perplexity": "exp of the loss per word",
    "unigram_entropy": "nats; the loss of knowing only how frequent each token is",
    "masked_loss": "nats per masked token",
    "masked_perplexity": "exp of the masked loss",
    "masked_accuracy": "share of masked tokens whose likeliest guess is right",
    "top_1": "share of masks whose likeliest guess is right",
    "top_5": "share of masks with the right token among the five likeliest",
    "context_gain": "fall of the loss from a short to a long context, nats",
    "own_perplexity": "of the generated text, under the model itself",
    "own_bits_per_byte": "of the generated text, under the model itself",
    "repetition_4": "share of 4-grams that stood in the text before",
    "repetition_in_32_tokens": "share of tokens that occur among the 32 before",
    "longest_repeat": "tokens of the longest run that stands in a text twice",
    "prompt_copies_4": "share of 4-grams that stand in the prompt",
    "coherence": "cosine of the mean hidden states of prompt and text",
    "self_bleu": "BLEU of each text with the others as references",
    "zipf_exponent": "of the frequencies of tokens",
    "share_of_texts_cut": "texts longer than the length that was read",
    "gain_over_scratch": "accuracy less that of the same network trained from nothing",
    "gain_over_tfidf": "accuracy less that of TF-IDF",
}
BASELINES = {
    "distinct_": "different n-grams as a share of all",
    "scratch_": "baseline: the same network trained from nothing",
    "tfidf_cut_": "baseline: TF-IDF of the tokens that the model read",
    "tfidf_": "baseline: TF-IDF with logistic regression",
    "majority_": "baseline: always the most frequent class",
    "loss_at_": "nats per token, with so many tokens of context",
}
TASKS = {
    "lm": "How well held-out text is predicted.",
    "context": "The loss of the same tokens with more and more text before them.",
    "classify": "Fine-tuning on labelled texts, beside baselines on the same texts.",
    "approximation": "How far the attention is from exact softmax attention on the same queries and keys. `..._exact`, "
    "`..._window` and `..._pooled` are the same weights with another attention.",
    "induction": "Random text twice: `exact` is the share of repeated tokens that are guessed, `gain` what the first "
    "copy adds, in nats a token.",
    "generate": "What the model writes, or fills in. The rows of real text to read it against are not shown here.",
}
SHOWN_SETTINGS = ("length", "max_length", "stride", "epochs", "seeds", "decodings")


def meaning(name: str) -> str:
    """What a metric says; "" for those that docs/evaluation.md of the project explains."""
    if name in MEANINGS:
        return MEANINGS[name]
    return next((words for start, words in BASELINES.items() if name.startswith(start)), "")


def results(record: RunRecord) -> Iterator[str]:
    """The blocks of "Results"."""
    yield "## Results"
    if not record.results and not record.validation:
        yield "No evaluation of these weights is recorded: how good they are is unknown."
    elif record.results:
        yield (
            "From the run's own result files, of exactly these weights. Intervals are 95%, over the items of the test "
            "data; ± is the standard deviation over seeds of fine-tuning. Each table has every metric that the "
            "file names, good or bad; its tables and curves are left out. The evaluation guide of nystrom-pretrain "
            "defines them."
        )
    if record.validation:
        yield _validation(record.validation)
    for result in record.results:
        yield f"### {code(result['suite'])}"
        yield _about(result)
        rows = [_row(name, metric) for name, metric in result["metrics"].items() if isinstance(metric, dict)]
        yield table(["metric", "value", "95% interval", "over", "meaning"], rows)
    if record.other_results:
        yield (f"Results of other weights or settings of the model are not shown: {listed(record.other_results, 8)}.")


def _validation(line: dict[str, Any]) -> str:
    words = f"At the end of training the loss on held-out text was {number(line.get('loss'))} nats"
    if isinstance(line.get("accuracy"), float):
        words += f" (accuracy {number(line['accuracy'])})"
    words += f", over {number(line.get('targets'))} predicted tokens in rows of {number(line.get('seq_len'))}"
    return words + "; no interval is recorded."


def _about(result: dict[str, Any]) -> str:
    """The test data and the settings, in a line or two."""
    data, settings = result.get("data") or {}, result.get("settings") or {}
    named = data.get("test") or data.get("dataset") or settings.get("dataset") or data.get("path")
    words = [f"{TASKS.get(result['task'], '')} Task {code(result['task'])}".lstrip()]
    # A path is somebody's own: its last part names the data, and the hash says which they were.
    words.append(f"data {code(PurePath(str(named)).name)}" if named else "data not named")
    for key, unit in (("documents", "documents"), ("tokens", "tokens"), ("test_records", "records")):
        if isinstance(data.get(key), int):
            words.append(f"{data[key]:,} {unit}")
    if isinstance(data.get("hash"), str):
        words.append(f"hash {code(data['hash'][:12])}")
    words += [f"{key} {code(_value(settings[key]))}" for key in SHOWN_SETTINGS if settings.get(key) is not None]
    text = ", ".join(words) + "."
    if "contamination" in settings and settings["contamination"] is None:
        text += " Whether the test text occurs in the training text was not examined."
    if result.get("gate") == "forced":
        text += " **Scored by force: the validity gate had failed.**"
    return text


def _value(setting: Any) -> str:
    return ", ".join(map(str, setting)) if isinstance(setting, list) else str(setting)


def _row(name: str, metric: dict[str, Any]) -> list[str]:
    value = number(metric.get("value"), padded=True)
    if isinstance(metric.get("std"), float):
        value += f" ± {number(metric['std'], padded=True)}"
    low, high = metric.get("low"), metric.get("high")
    interval = "none" if low is None or high is None else f"{number(low, padded=True)} to {number(high, padded=True)}"
    unit = metric.get("unit") or ("seeds" if "std" in metric else "items")
    over = "unknown" if metric.get("n") is None else f"{number(metric['n'])} {unit}"
    return [code(name), value, interval, over, meaning(name)]


def banner(verdict: Verdict | None) -> str:
    """What stands above all else if the gate did not pass; "" if it did."""
    if verdict is None:
        return (
            "> **Not examined.** The validity gate has not looked at these weights. Whether their scores mean what "
            "they seem to mean is unknown."
        )
    if not verdict.passed:
        failed = "".join(f"\n> - {failure}" for failure in verdict.failures or ("no check is named",))
        return (
            "> **This model FAILED the validity gate.** Its scores and outputs are not what they seem: do not build "
            f"on them.\n>{failed}"
        )
    return ""


def validity(record: RunRecord, causal: bool) -> Iterator[str]:
    """The blocks of "Validity"."""
    yield "## Validity"
    looked = "no output moves with the other texts of the batch, or with the amount of padding" + (
        "; no output depends on a later token; decoding token by token equals the forward pass" if causal else ""
    )
    verdict = record.verdict
    what = f"The gate of nystrom-pretrain checks, with controls, that {looked}."
    if verdict is None:
        yield f"**Not examined.** {what} Nobody has run it on these weights (`nystrom eval validity`)."
    elif verdict.passed:
        yield f"**Passed**: all {verdict.checks} checks ({verdict.created[:10] or 'date unknown'}). {what}"
    else:
        failed = len(verdict.failures)
        counted = f"{failed} of {verdict.checks} checks" if failed else "the checks are not named"
        yield f"**FAILED**: {counted} ({verdict.created[:10] or 'date unknown'}), named at the top. {what}"
    if verdict is not None:
        yield "It looked at the float32 weights in nystrom-pretrain, not at this folder in another library."
