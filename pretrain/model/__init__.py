"""The model: a Nystromformer that is masked or causal, and everything that is part of the function it computes."""

from pretrain.model.config import ModelConfig

__all__ = ["LMOutput", "Layout", "ModelConfig", "NystromformerLM", "build_model"]

_LAZY = {
    "LMOutput": "pretrain.model.transformer",
    "NystromformerLM": "pretrain.model.transformer",
    "build_model": "pretrain.model.transformer",
    "Layout": "pretrain.model.attention.layout",
}


def __getattr__(name: str) -> object:
    # pretrain.config imports this package for ModelConfig, and a command's --help must not wait for torch.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
