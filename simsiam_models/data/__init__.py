"""Files -> two augmented views on the device."""
from .augment import Augmentation
from .decode import UnreadableError
from .demo import demo_images
from .loader import EvalImages, TwoViews
from .sources import FolderImages, MemoryImages, open_folder
