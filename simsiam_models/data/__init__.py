"""Files -> two augmented views on the device."""
from .augment import Augmentation
from .demo import demo_images
from .loader import EvalImages, TwoViews
from .sources import FolderImages, MemoryImages, UnreadableError, open_folder
