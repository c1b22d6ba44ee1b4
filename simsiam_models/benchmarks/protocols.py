"""The published evaluation protocols. Every number appears here once; the comments name its source.

MMSelfSup is open-mmlab/mmselfsup v0.9.1; paths are relative to that repository.
"""
from dataclasses import dataclass

SIZE, RESIZE = 224, 256  # pixels, of all protocols: test images have their short side resized, then are cropped
LEAST = 8  # pixels: the smallest image size that a command accepts; not from a source

# kNN: tools/benchmarks/classification/knn_imagenet/test_knn.py of MMSelfSup.
KNN_KS, KNN_T = (10, 20, 100, 200), 0.07


@dataclass(frozen=True, kw_only=True)
class LinearProtocol:
    """A linear evaluation protocol. The comments at `LINEAR` name the sources of its numbers."""

    name: str
    inputs: str  # 'avgpool': the backbone's pooled features; 'five': MMSelfSup's five pooled and batch-normed maps
    optimizer: str  # 'larc': apex LARC, clip=False; 'lars_mmselfsup': lr inside the momentum buffer; 'sgd'
    batch_size: int  # samples per optimizer step, over all processes
    lr: float
    lr_per_256: bool = False  # lr is per 256 samples of the batch
    epochs: int
    schedule: str  # 'cosine': lr * 0.5 (1 + cos(pi epoch / epochs)), epoch from 0; 'steps': lr * lr_gamma after each
    augmentation: str  # 'resized_crop'; 'resized_crop_colour': + colour jitter and PCA lighting; 'random_crop'
    eval_every: int  # epochs; the last epoch is always evaluated
    reported: str  # the epoch whose accuracy is published: 'best' or 'last'
    lr_steps: tuple[int, ...] = ()  # completed epochs
    lr_gamma: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    trust: float = 0.001  # coefficient of LARC and LARS
    init_std: float = 0.01  # of the classifier's weights; its bias starts at 0
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area
    jitter: float = 0.4  # brightness, contrast, saturation; always applied
    lighting: float = 0.1  # standard deviation of the PCA noise
    flip_p: float = 0.5
    image_size: int = SIZE
    resize: int = RESIZE
    report_epochs: tuple[int, ...] = ()  # reported in addition to the last epoch

    @property
    def scaled_lr(self) -> float:
        """Returns the learning rate at the first step."""
        return self.lr * self.batch_size / 256 if self.lr_per_256 else self.lr

    @property
    def idle(self) -> set[str]:
        """Returns the names of the numbers that this protocol does not use."""
        steps, colour = self.schedule == 'steps', self.augmentation == 'resized_crop_colour'
        used = {
            'lr_steps': steps, 'lr_gamma': steps, 'jitter': colour, 'lighting': colour,
            'crop_scale': self.augmentation != 'random_crop', 'trust': self.optimizer != 'sgd'}
        return {name for name, is_used in used.items() if not is_used}


MHEAD = dict(
    inputs='five', optimizer='sgd', batch_size=256, lr=0.01, schedule='steps', nesterov=True, weight_decay=1e-4,
    eval_every=10, reported='last')
LINEAR = {p.name: p for p in (
    # facebookresearch/simsiam, main_lincls.py and README. The paper's lr of 0.02 belongs to the authors' TPU code.
    LinearProtocol(
        name='fair', inputs='avgpool', optimizer='larc', batch_size=4096, lr=0.1, lr_per_256=True, epochs=90,
        schedule='cosine', augmentation='resized_crop', eval_every=1, reported='best'),
    # MMSelfSup's AvgPool column: imagenet/resnet50_linear-8xb512-coslr-90e_in1k.py in
    # configs/benchmarks/classification, which the following paths are relative to.
    LinearProtocol(
        name='mmselfsup', inputs='avgpool', optimizer='lars_mmselfsup', batch_size=4096, lr=1.6, epochs=90,
        schedule='cosine', augmentation='resized_crop', eval_every=10, reported='last'),
    # facebookresearch/moco, main_lincls.py; the same numbers in imagenet/resnet50_linear-8xb32-steplr-100e_in1k.py.
    LinearProtocol(
        name='moco', inputs='avgpool', optimizer='sgd', batch_size=256, lr=30.0, epochs=100,
        schedule='steps', lr_steps=(60, 80), augmentation='resized_crop', eval_every=1, reported='best'),
    # MMSelfSup's Feature1 .. Feature5 columns: imagenet/resnet50_mhead_linear-8xb32-steplr-90e_in1k.py.
    LinearProtocol(name='mhead', epochs=90, lr_steps=(30, 60), augmentation='resized_crop_colour', **MHEAD),
    # places205/resnet50_mhead_8xb32-steplr-28e_places205.py. It evaluates after epochs 10 and 20 and not after 28;
    # MMSelfSup's table does not say which epoch it shows.
    LinearProtocol(
        name='mhead_places205', epochs=28, lr_steps=(7, 14, 21), augmentation='random_crop', report_epochs=(20,),
        **MHEAD),
    # inaturalist2018/resnet50_mhead_8xb32-steplr-84e_inat18.py.
    LinearProtocol(name='mhead_inat18', epochs=84, lr_steps=(24, 48, 72), augmentation='resized_crop', **MHEAD))}

# VOC07 SVM and low-shot SVM: tools/benchmarks/classification/svm_voc07 of MMSelfSup.
SVM_COSTS = (1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20)))  # in this order: the first of equal ones is chosen
LINEAR_SVC = dict(
    class_weight={1: 2, -1: 1}, intercept_scaling=1.0, penalty='l2', loss='squared_hinge', tol=1e-4, dual=True,
    max_iter=2000)
SVM_FOLDS = 3
SVM_AP = 'envelope at all points (mAP); 11-point beside it'
SVM_TAPS = ('feat1', 'feat2', 'feat3', 'feat4', 'feat5')
LOW_SHOT_KS = (1, 2, 4, 8, 16, 32, 64, 96)  # positives per class
LOW_SHOT_NEGATIVES = 19  # for each positive
LOW_SHOT_DRAWS = 5
SVM_COST_AT_K1 = 1.0  # the cost chosen without test images: k = 1 leaves no image to hold out. Not from a source

# Semi-supervised ImageNet: configs/benchmarks/classification/imagenet/imagenet_{1percent,10percent} of MMSelfSup.
SEMI = {'epochs': 20, 'batch_size': 256}  # a flag may change these
SEMI_FIXED = {
    'optimizer': 'sgd', 'momentum': 0.9, 'steps': (12, 16), 'crop_scale': (0.08, 1.0), 'flip': 0.5, 'eval_every': 10}
SEMI_LR_GAMMA = 0.2  # the rate is multiplied by it after each of the steps
SEMI_WEIGHT_DECAY = {'semi_1pct': 5e-4, 'semi_10pct': 1e-4}
SEMI_LRS, SEMI_HEAD_MULTIPLIERS = (0.1, 0.01, 0.001), (1.0, 10.0, 100.0)  # of the backbone; of the classifier's rate
