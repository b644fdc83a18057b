"""What a person sees of a run: metrics, events, TensorBoard, progress, status. Imports no torch."""

from multitrain.monitor.events import Events
from multitrain.monitor.metrics import Metrics
from multitrain.monitor.recorder import Recorder
from multitrain.monitor.status import status
from multitrain.monitor.status_text import table

__all__ = ["Events", "Metrics", "Recorder", "status", "table"]
