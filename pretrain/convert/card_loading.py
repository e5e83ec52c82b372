"""The model card's section on loading: code to copy, and what stock transformers does wrong with the same weights."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.checkpoint.load import LoadedModel
from pretrain.convert.markdown import block
from pretrain.convert.stock import is_exact

OPENING = """
from transformers import {auto}, AutoTokenizer

folder = "."  # this folder, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = {auto}.from_pretrained(folder{trust}).eval()
"""
FILLING = """
inputs = tokenizer("Some text with a {mask} in it.", return_tensors="pt")
logits = model(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id]
print(tokenizer.batch_decode(logits.topk(5).indices[0][:, None]))
"""
WRITING = """
inputs = tokenizer("The beginning of a text", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_p=0.95)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
"""


def loading(loaded: LoadedModel, folder_kind: str, stock_length: int | None, failed: bool) -> Iterator[str]:
    """The blocks of "Loading". ``failed``: the validity gate found a fault, so that nothing is promised."""
    causal = loaded.model_config.objective == "clm"
    auto = "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"
    mask = loaded.tokenizer.mask_id
    use = WRITING if mask is None or causal else FILLING.format(mask=loaded.tokenizer.name_of(mask))
    yield "## Loading"
    if folder_kind != "stock":
        yield (
            "The folder carries the code of the model, which needs torch and transformers and nothing else. Read it "
            "before you trust it: `trust_remote_code=True` runs it."
        )
        yield block(OPENING.format(auto=auto, trust=", trust_remote_code=True") + use)
        if not failed:
            longest = loaded.model_config.max_positions if loaded.model_config.positions == "learned" else None
            lengths = f"texts can have up to {longest:,} tokens" if longest else "texts can have any length"
            yield f"Padding masks are obeyed, {lengths}, and bf16 works (`dtype=torch.bfloat16`)."
    else:
        yield block(OPENING.format(auto=auto, trust="") + use)
        yield "The code is transformers' own Nyströmformer, which agrees on texts without padding and has these faults:"
        yield "\n".join(f"- {fault}" for fault in faults(loaded, stock_length))


def faults(loaded: LoadedModel, stock_length: int | None) -> Iterator[str]:
    """What stock transformers (5.23) does wrong, measured on its published implementation."""
    if is_exact(loaded.model_config, stock_length):
        yield (
            "**Padding changes the results**: the convolution reads the padding, whatever the mask says. Give texts of "
            "one length, without padding."
        )
        if "nystrom" in loaded.model_config.attention_by_layer:
            landmarks = 2 * loaded.model_config.num_landmarks
            yield (
                f"**Lengths**: attention is exact there at every length. Texts of {landmarks:,} tokens or more have "
                "landmarks in this model, and other results."
            )
        return
    yield (
        "**Padding**: a batch with a padding mask ends with an error. Without the mask the padding is read as text. "
        "Give texts of one length, without padding."
    )
    yield "**bf16 and fp16**: a model cast to either ends with an error. Load it as float32."
    at = f"`segment_means_seq_len` ({stock_length:,} here)" if stock_length else "`segment_means_seq_len`"
    yield (
        f"**Lengths**: a text must have exactly {at} tokens. Another length ends with an error, or silently mixes two "
        "texts of a batch."
    )
    yield "**Batches**: the other texts change the result slightly, since the inverse starts from a common maximum."
