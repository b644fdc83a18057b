"""The typed schema of `configs/`: one class per package that uses it. No torch."""

from multitrain.config.augment import AugmentConfig
from multitrain.config.cluster import ClusterConfig
from multitrain.config.compose import compose, config_folder, dump, flat, leaves, load, validate
from multitrain.config.data import DataConfig, DatasetConfig
from multitrain.config.engine import CheckpointConfig, EngineConfig, MonitorConfig
from multitrain.config.errors import ConfigError, nearest
from multitrain.config.evaluation import EvalConfig
from multitrain.config.loss import LossConfig
from multitrain.config.model import ModelConfig
from multitrain.config.optim import OptimConfig
from multitrain.config.run import RunConfig

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "DatasetConfig",
    "EngineConfig",
    "EvalConfig",
    "LossConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "RunConfig",
    "compose",
    "config_folder",
    "dump",
    "flat",
    "leaves",
    "load",
    "nearest",
    "validate",
]
