"""The configs of a run, importable from the repository root; their home is `looktwice.config`."""

from looktwice.config import DataConfig as DataConfig
from looktwice.config import GRPOConfig as GRPOConfig
from looktwice.config import InferenceConfig as InferenceConfig
from looktwice.config import ModelConfig as ModelConfig
from looktwice.config import SFTConfig as SFTConfig
