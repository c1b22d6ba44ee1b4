"""Published checkpoints and backbones, in and out."""
from .export import export_backbone
from .layouts import Checkpoint, load_checkpoint

__all__ = ['Checkpoint', 'export_backbone', 'load_checkpoint']
