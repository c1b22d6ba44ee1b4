"""SimSiam for timm: models, pretraining, published weights. Importing it registers the models with timm."""
from .runtime import start  # isort: skip
from .resnet import simsiam_resnet18_cifar, simsiam_resnet50
from .simsiam import SimSiam, create_simsiam, simsiam_loss
from .weights import Checkpoint, load_checkpoint

__version__ = '0.1.0'
__all__ = [
    'Checkpoint', 'SimSiam', 'create_simsiam', 'load_checkpoint', 'simsiam_loss', 'simsiam_resnet18_cifar',
    'simsiam_resnet50']
