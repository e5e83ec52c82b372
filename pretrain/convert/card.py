"""The model card: ``README.md`` of a folder for transformers, written from the files of the run and nothing else.

No number in it is from anywhere but the checkpoint, its run, its shards' manifests and its evaluation results. What
those do not say is called unknown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from data_pipeline.files import write_atomic
from pretrain.checkpoint.load import LoadedModel
from pretrain.convert import card_results, card_training
from pretrain.convert.card_loading import loading
from pretrain.convert.markdown import block, number, table
from pretrain.convert.names import CARD, GATE_TAGS, UNKNOWN
from pretrain.convert.run_record import RunRecord, Verdict, read_record
from pretrain.curriculum.stages import trained_length
from pretrain.model.attention.pattern import label
from pretrain.model.config import ModelConfig

_LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 "
    "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl lgpl-lr unknown"
)
LICENCES = frozenset(_LICENCES.split())
"""Identifiers that the hub knows (huggingface.co/docs/hub/repositories-licenses), without those of single models.

It refuses a card with another one, except as the name of an ``other`` licence.
"""
CITATION = """
@inproceedings{xiong2021nystromformer,
  title     = {Nystr{\\"o}mformer: A Nystr{\\"o}m-based Algorithm for Approximating Self-Attention},
  author    = {Xiong, Yunyang and Zeng, Zhanpeng and Chakraborty, Rudrasis and Tan, Mingxing and Fung, Glenn and
               Li, Yin and Singh, Vikas},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2021}
}
"""
Kind = Literal["stock", "custom"]


def write_card(
    loaded: LoadedModel,
    out: Path,
    *,
    folder_kind: Kind,
    dtype: str,
    licence: str = UNKNOWN,
    language: str | None = None,
    stock_length: int | None = None,
) -> None:
    """Write ``out/README.md`` for the weights ``loaded`` as they lie in ``out``; raises ``OSError``.

    ``folder_kind``: "stock" if transformers' own Nyströmformer loads the folder, "custom" if it carries its code.
    ``dtype``: of the stored weights, such as "float32". ``licence``: of the weights, an
    identifier of the hub or any name; by default it is said to be unknown. ``language``: codes such as "en,de".
    ``stock_length``: ``segment_means_seq_len`` of a folder for stock transformers, in tokens.
    """
    text = card(loaded, read_record(loaded), folder_kind, dtype, licence, language, stock_length)
    write_atomic(out / CARD, text.encode())


def card(
    loaded: LoadedModel,
    record: RunRecord,
    folder_kind: Kind,
    dtype: str,
    licence: str = UNKNOWN,
    language: str | None = None,
    stock_length: int | None = None,
) -> str:
    """The card's text; see :func:`write_card`."""
    licence = " ".join(licence.split()) or UNKNOWN
    verdict, causal = record.verdict, loaded.model_config.objective == "clm"
    head = yaml.safe_dump(_metadata(loaded, verdict, folder_kind, licence, language), sort_keys=False)
    blocks = [
        f"# {loaded.run_config.name}",
        card_results.banner(verdict),
        _summary(loaded),
        *_model(loaded, dtype),
        *loading(loaded, folder_kind, stock_length, failed=verdict is not None and not verdict.passed),
        *card_training.data(loaded, record),
        *card_training.training(loaded, record),
        *card_results.results(record),
        *card_results.validity(record, causal),
        *_limits(loaded, record, language),
        *_licence(folder_kind, licence),
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(block for block in blocks if block) + "\n"


def _metadata(
    loaded: LoadedModel, verdict: Verdict | None, folder_kind: Kind, licence: str, language: str | None
) -> dict[str, Any]:
    """The front matter, which the hub reads."""
    causal = loaded.model_config.objective == "clm"
    known = licence.lower()
    out: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if causal else "fill-mask",
        "license": known if known in LICENCES else "other",
    }
    if known not in LICENCES:
        # As the names that are in use on the hub are written; the whole name stands in the card's section.
        out["license_name"] = re.sub(r"[^a-z0-9.]+", "-", known).strip("-.") or "unnamed"
    if language:
        out["language"] = [code.strip() for code in language.split(",") if code.strip()]
    out["tags"] = [
        "nystromformer",
        "causal-lm" if causal else "masked-lm",
        *(["custom_code"] if folder_kind != "stock" else []),
        GATE_TAGS[None if verdict is None else verdict.passed],
    ]
    return out


def _parameters(loaded: LoadedModel, *, embeddings: bool = True) -> int:
    model: Any = loaded.model
    return int(model.num_parameters(embeddings=embeddings))


def _summary(loaded: LoadedModel) -> str:
    model = loaded.model_config
    kind = "causal language model" if model.objective == "clm" else "masked language model"
    what = f"A {kind} of {_parameters(loaded):,} parameters with {_form_name(model)}"
    if not loaded.tokens:
        return (
            f"{what}. Nystrom-pretrain has not trained these weights: they are from elsewhere, or as they were drawn."
        )
    return (
        f"{what}, pretrained on "
        f"{loaded.tokens:,} tokens with nystrom-pretrain, at lengths of up to "
        f"{trained_length(loaded.run_config, loaded.tokens):,} tokens."
    )


def _form_name(model: ModelConfig) -> str:
    names = {"nystrom": "Nyström attention", "softmax": "softmax attention", "window": "windowed attention"}
    found = [names.get(name, f"{name} attention") for name in dict.fromkeys(model.attention_by_layer)]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]} by layer"


def attention_in_words(model: ModelConfig) -> str:
    """What a token sees, in a sentence or two."""
    layers = Counter(model.attention_by_layer)
    words = ", and ".join(
        (f"in {count} of {model.num_layers} layers " if len(layers) > 1 else "") + _form_in_words(model, name)
        for name, count in layers.items()
    )
    return words + (f"; plus a depthwise convolution of {model.conv_kernel} taps" if model.conv_kernel else "")


def _form_in_words(model: ModelConfig, form: str) -> str:
    causal = model.objective == "clm"
    window = model.window_segments * model.segment_length
    if form == "softmax":
        words = "exact softmax attention"
    elif form == "window":
        sides = "" if causal else f", and {model.window_segments - 1} on the other side"
        words = (
            f"exact attention to {model.window_segments} segments of {model.segment_length} tokens{sides}; no others"
        )
    elif form == "nystrom" and causal:
        values = "through a triangular inverse" if model.landmark_inverse else "pooled"
        far = "each earlier segment through one landmark"
        if model.landmark_levels > 1:
            far = (
                f"earlier ones through a pyramid of landmarks (band {model.landmark_band}, branching "
                f"{model.landmark_branching}, at most {model.landmark_levels} levels)"
            )
        if model.recall_segments:
            far += f", of which each token reads the {model.recall_segments} that it asks for most exactly"
            window += model.recall_segments * model.segment_length
        words = (
            f"Nyström-style landmarks, causal: {model.window_segments} segments of {model.segment_length} tokens "
            f"exactly, {far}, values {values}; exact up to {window} tokens"
        )
    elif form == "nystrom" and model.landmark_inverse:
        words = (
            f"Nyström attention (Xiong et al. 2021) with {model.num_landmarks} landmarks, {model.inverse_iterations} "
            f"steps of the iterative pseudo-inverse; exact below {2 * model.num_landmarks} tokens"
        )
    elif form == "nystrom":
        words = (
            f"mean keys and values of {model.num_landmarks} segments, without the inverse; exact up to "
            f"{model.num_landmarks} tokens"
        )
    else:
        words = f"the form {form}, which is not one of nystrom-pretrain's own"
    return words


def _model(loaded: LoadedModel, dtype: str) -> Iterator[str]:
    model, tokenizer = loaded.model_config, loaded.tokenizer
    spare = "" if model.vocab_size == tokenizer.vocab_size else f", in a table of {number(model.vocab_size)} rows"
    objective = {"clm": "causal: the next token", "mlm": "masked: hidden tokens"}[model.objective]
    rows = [
        ["objective", objective],
        ["attention", attention_in_words(model)],
        ["parameters", f"{_parameters(loaded):,} ({_parameters(loaded, embeddings=False):,} without "
                       "the tables of words and positions)"],
        ["layers", f"{model.num_layers} of width {model.hidden_size}, {model.num_heads} heads, feed-forward "
                   f"{', '.join([_feed_forward(model), *_block(model)])}"],
        ["positions", _positions(model)],
        ["vocabulary", f"{tokenizer.vocab_size:,} tokens{spare}"],
        ["stored as", dtype],
        ["SHA-256 of the weights", f"`{loaded.weights_hash}` (float32, as trained)"],
    ]  # fmt: skip
    yield "## The model"
    yield table(["property", "value"], rows)


def _feed_forward(model: ModelConfig) -> str:
    return f"{model.ffn_size}" if model.ffn == "gelu" else f"{model.ffn_size} ({model.ffn})"


def _block(model: ModelConfig) -> Iterator[str]:
    yield f"{model.norm}-norm" if model.norm_kind == "layernorm" else f"{model.norm}-norm ({model.norm_kind})"
    if model.qk_norm:
        yield "queries and keys normed"
    if not model.bias:
        yield "no biases"


def _positions(model: ModelConfig) -> str:
    if model.positions == "learned":
        return f"learned, {model.max_positions:,} of them"
    if not model.rotary:
        return "none"
    scaled = f", positions times {number(model.rope_position_scale)}" if model.rope_position_scale != 1 else ""
    rule = " by YaRN" if scaled and model.rope_scaling == "yarn" else ""
    layers = "" if isinstance(model.positions, str) else f" ({label(model.positions, model.num_layers)})"
    return f"rotary, base {number(model.rope_theta)}{scaled}{rule}{layers}"


def _limits(loaded: LoadedModel, record: RunRecord, language: str | None) -> Iterator[str]:
    longest = trained_length(loaded.run_config, loaded.tokens)
    model = loaded.model_config
    beyond = (
        f"No text can be longer than {model.max_positions:,} tokens."
        if model.positions == "learned"
        else "Longer texts are taken, but nothing says that they are read well."
    )
    known = [source.manifest for source in record.sources if source.manifest]
    corpus = (
        f" ({sum(m.num_documents for m in known):,} documents)" if known and len(known) == len(record.sources) else ""
    )
    before = ", and what the weights knew that it started with" if loaded.run_config.init_from else ", and nothing else"
    trained = f"It was trained on rows of up to {longest:,} tokens" if loaded.tokens else "Trained lengths are unknown"
    items = [
        f"**Length.** {trained}. {beyond}",
        f"**Corpus.** It knows what its training text{corpus} says, with the errors and prejudices of that text"
        f"{before}.",
        "**Language.** "
        + (f"Said to be {language}." if language else "Which languages the text is in is not recorded."),
        "**Safety.** It had no training for safety, truthfulness or instructions. What it writes is not filtered.",
        f"**Size.** {_parameters(loaded):,} parameters and {loaded.tokens:,} tokens. Measure it on your own "
        "task, beside a baseline, before you rely on it.",
    ]
    yield "## Limits"
    yield "\n".join(f"- {item}" for item in items)


def _licence(folder_kind: Kind, licence: str) -> Iterator[str]:
    yield "## Licence"
    if licence.lower() == UNKNOWN:
        yield "The licence of the weights is unknown: whoever made this folder named none."
    else:
        yield f"The weights: {licence}, as named by whoever made this folder."
    if folder_kind != "stock":
        yield "The Python files of this folder are part of nystrom-pretrain, under Apache-2.0."
    yield "## Citation"
    yield "Nyström attention for transformers is by Xiong et al. 2021:"
    yield block(CITATION, "bibtex")
