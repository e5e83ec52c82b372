"""The one typed configuration of a pretraining run: a YAML file, strict keys, dotted overrides.

Everything that a run does follows from this object; it is written to the run folder as ``config.yaml`` and read back
from there. The DeepSpeed JSON is generated from it (``pretrain/engine/deepspeed_config.py``), never written by hand.
"""

from pretrain.config.data import DataConfig, MaskingConfig, SourceConfig
from pretrain.config.load import load_config, parse_config
from pretrain.config.optimizer import OptimizerConfig, ScheduleConfig
from pretrain.config.outputs import CallbackConfig, CheckpointConfig, TelemetryConfig, ValidationConfig
from pretrain.config.run import RunConfig, StageConfig

__all__ = [
    "CallbackConfig",
    "CheckpointConfig",
    "DataConfig",
    "MaskingConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "TelemetryConfig",
    "ValidationConfig",
    "load_config",
    "parse_config",
]
