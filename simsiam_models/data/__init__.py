"""Files -> two augmented views on the device."""
from .augment import Augmentation
from .decode import DataError, UnreadableError
from .demo import demo_images
from .loader import EvalImages, TwoViews
from .opening import open_data
from .sources import FolderImages, Images, MemoryImages, Stream, pixels_digest
