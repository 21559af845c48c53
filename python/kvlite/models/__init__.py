"""Models: from a Hugging Face folder to a decoder that runs over paged KV.

Knows `kvlite.layers` and the file formats; knows neither requests, blocks nor sampling. Called by `kvlite.runner`.
"""

from kvlite.models.batch import ForwardBatch
from kvlite.models.config import Family, KeyMap, ModelConfig, Traits
from kvlite.models.decoder import Decoder, load_model
from kvlite.models.probe import LayerRows, Probe, rows_to_the_end
from kvlite.models.registry import FAMILIES, load_config
from kvlite.models.weights import Progress

__all__ = [
    "FAMILIES",
    "Decoder",
    "Family",
    "ForwardBatch",
    "KeyMap",
    "LayerRows",
    "ModelConfig",
    "Probe",
    "Progress",
    "Traits",
    "load_config",
    "load_model",
    "rows_to_the_end",
]
