"""Which tokens of a vocabulary begin a text, end it, pad, stand for the unknown and mask: by configuration or name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from data_pipeline.errors import UserError

BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
SPECIAL_TOKENS = (BOS, PAD, EOS, UNK, MASK)  # of tokenizers trained here: their places in this tuple are their ids

# Names of the special tokens in well-known vocabularies (RoBERTa, BERT, Gemma, Llama 3, GPT-2), the first found counts.
WELL_KNOWN: dict[str, tuple[str, ...]] = {
    "bos": (BOS, "[BOS]", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "pad": (PAD, "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "eos": (EOS, "[EOS]", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "unk": (UNK, "[UNK]", "<|unk|>"),
    "mask": (MASK, "[MASK]", "<|mask|>"),
}
ROLES = tuple(WELL_KNOWN)
# What transformers' files call the roles; BERT's separator ends its documents and its [CLS] begins them.
_KEYS = {
    "bos": ("bos_token", "cls_token"),
    "pad": ("pad_token",),
    "eos": ("eos_token", "sep_token"),
    "unk": ("unk_token",),
    "mask": ("mask_token",),
}


@dataclass(frozen=True)
class Roles:
    """Token ids by role; ``eos`` ends every document of a stream. ``None``: the vocabulary has no such token."""

    bos: int | None
    pad: int
    eos: int
    unk: int | None
    mask: int | None

    def as_dict(self) -> dict[str, int]:
        """Role -> id, of the roles that there are."""
        return {role: id_ for role, id_ in asdict(self).items() if id_ is not None}


def declared_roles(config: Mapping[str, object]) -> dict[str, str | None]:
    """Role -> token text as the keys of ``tokenizer_config.json`` or ``special_tokens_map.json`` say.

    A token is a string or an object with ``content``. A role is ``None`` where the file says null, and left out where
    the file is silent.
    """
    out: dict[str, str | None] = {}
    for role, keys in _KEYS.items():
        for key in keys:
            if key in config:
                value = config[key]
                text = value.get("content") if isinstance(value, Mapping) else value
                if text is not None and not isinstance(text, str):
                    raise UserError(f"{key} must be a string or an object with 'content', it is {value!r}")
                out[role] = out.get(role) or text
    return out


def find_roles(declared: Mapping[str, str | None], specials: Mapping[str, int], unk: str | None, where: str) -> Roles:
    """The ids of the roles: as declared, else the special token with a well-known name.

    ``specials`` are the special tokens, text -> id; ``unk`` is what the model itself falls back to. Padding falls back
    to ``eos``: padded places are hidden from the model and from the loss, so the token there does not matter.

    Raises :class:`UserError` that begins with ``where`` if there is no token that can end a document.
    """

    def find(role: str) -> int | None:
        if role in declared:
            text = declared[role]
            return None if text is None else specials[text]
        known = next((specials[name] for name in WELL_KNOWN[role] if name in specials), None)
        return specials.get(unk) if known is None and role == "unk" and unk is not None else known

    found = {role: find(role) for role in ROLES}
    eos = found["eos"]
    if eos is None:
        names = ", ".join(specials) if specials else "none"
        raise UserError(
            f"{where}: no token that ends a document (special tokens: {names}); name one as eos_token (or sep_token) "
            "in tokenizer_config.json beside it"
        )
    pad = found["pad"]
    return Roles(found["bos"], eos if pad is None else pad, eos, found["unk"], found["mask"])


def check_objective(roles: Iterable[str] | Mapping[str, int], objective: str, where: str) -> None:
    """Raise :class:`UserError` for masked language modelling without a mask token.

    ``roles`` are the names of the roles that exist (the keys of :meth:`Roles.as_dict` and of a manifest's
    ``special_ids``), ``objective`` is "mlm" or "clm", ``where`` says whose tokenizer it is.
    """
    if objective == "mlm" and "mask" not in roles:
        raise UserError(
            f"{where}: masked language modelling needs a mask token, and this tokenizer has none: train with "
            "objective clm, or make the shards with a tokenizer that has one (`nystrom data tokenizer` trains such)"
        )
