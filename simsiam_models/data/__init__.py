"""Files -> two augmented views on the device."""
from .augment import Augmentation
from .demo import demo_images
from .evaluation import EvalImages, Transform
from .loader import TwoViews
from .opening import announce_unusable, open_data, open_parts
from .readers.decode import DataError, UnreadableError
from .readers.images import FolderImages, Images, MemoryImages, Stream, pixels_digest

__all__ = [
    'Augmentation', 'DataError', 'EvalImages', 'FolderImages', 'Images', 'MemoryImages', 'Stream', 'Transform',
    'TwoViews', 'UnreadableError', 'announce_unusable', 'demo_images', 'open_data', 'open_parts', 'pixels_digest']
