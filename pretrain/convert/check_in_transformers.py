"""Run by path, without this project: load a folder in transformers and compare its logits.

    python check_in_transformers.py FOLDER EXPECTED.safetensors AutoModelForMaskedLM

EXPECTED has ``input_ids`` and ``attention_mask`` (B, N) and the ``logits`` (T, V) of the T real tokens, in the dtype of
the folder. Prints the largest difference as one number.
"""

from __future__ import annotations

import sys

import torch
import transformers
from safetensors.torch import load_file


def main(folder: str, expected: str, kind: str) -> None:
    """Print the largest difference of a logit."""
    given = load_file(expected)
    model = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        got = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    real = given["attention_mask"].bool()
    print(float((got[real].double() - given["logits"].double()).abs().max()))


if __name__ == "__main__":
    main(*sys.argv[1:])
