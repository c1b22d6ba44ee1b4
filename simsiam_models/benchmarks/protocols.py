"""Every number of a published protocol, once. The comments say where it comes from."""
from dataclasses import dataclass

SIZE, LEAST = 224, 8  # pixels: the published protocols' image size, and the smallest that any command takes
KNN_KS, KNN_T = (10, 20, 100, 200), 0.07

@dataclass(frozen=True)
class LinearProtocol:
    """One linear protocol as literal numbers; the comments of LINEAR say where they come from."""

    name: str
    inputs: str  # 'avgpool': the backbone's pooled features; 'five': MMSelfSup's five pooled taps, batch norm on each
    optimizer: str  # 'larc': apex LARC, clip=False; 'lars_mmselfsup': lr inside the momentum buffer; 'sgd'
    batch_size: int  # samples per optimizer step, over all processes
    lr: float
    lr_per_256: bool  # lr is per 256 samples of the batch
    epochs: int
    schedule: str  # 'cosine': lr 0.5 (1 + cos(pi epoch / epochs)), epoch from 0; 'steps': x lr_gamma after each
    augmentation: str  # 'resized_crop'; 'resized_crop_colour': + colour jitter and PCA lighting; 'random_crop'
    eval_every: int  # epochs; the last one is always evaluated
    reported: str  # 'best' or 'last' epoch is the number of the protocol
    lr_steps: tuple[int, ...] = ()  # epochs done
    lr_gamma: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    trust: float = 0.001  # of LARC and LARS
    init_std: float = 0.01  # of the classifier's weights; its bias starts at 0
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area
    jitter: float = 0.4  # brightness, contrast, saturation; always
    lighting: float = 0.1  # standard deviation of the PCA noise
    flip_p: float = 0.5
    image_size: int = 224  # pixels
    resize: int = 256  # short side, pixels
    report_epochs: tuple[int, ...] = ()  # reported beside the last epoch

    @property
    def scaled_lr(self) -> float:
        return self.lr * self.batch_size / 256 if self.lr_per_256 else self.lr

    @property
    def idle(self) -> set[str]:
        """Numbers that play no part in this protocol."""
        steps, colour = self.schedule == 'steps', self.augmentation == 'resized_crop_colour'
        return {
            *(() if steps else ('lr_steps', 'lr_gamma')), *(() if colour else ('jitter', 'lighting')),
            *(('crop_scale',) if self.augmentation == 'random_crop' else ()),
            *(('trust',) if self.optimizer == 'sgd' else ())}


MHEAD = dict(
    inputs='five', optimizer='sgd', batch_size=256, lr=0.01, lr_per_256=False, schedule='steps', nesterov=True,
    weight_decay=1e-4, eval_every=10, reported='last')
LINEAR = {p.name: p for p in (
    # facebookresearch/simsiam, main_lincls.py and its README; the paper's text has lr 0.02 (TPU).
    LinearProtocol(
        'fair', inputs='avgpool', optimizer='larc', batch_size=4096, lr=0.1, lr_per_256=True, epochs=90,
        schedule='cosine', augmentation='resized_crop', eval_every=1, reported='best'),
    # MMSelfSup v0.9.1, resnet50_linear-8xb512-coslr-90e_in1k: its tables' AvgPool column.
    LinearProtocol(
        'mmselfsup', inputs='avgpool', optimizer='lars_mmselfsup', batch_size=4096, lr=1.6, lr_per_256=False, epochs=90,
        schedule='cosine', augmentation='resized_crop', eval_every=10, reported='last'),
    # facebookresearch/moco, main_lincls.py; MMSelfSup's resnet50_linear-8xb32-steplr-100e has the same numbers.
    LinearProtocol(
        'moco', inputs='avgpool', optimizer='sgd', batch_size=256, lr=30.0, lr_per_256=False, epochs=100,
        schedule='steps', lr_steps=(60, 80), augmentation='resized_crop', eval_every=1, reported='best'),
    # MMSelfSup v0.9.1, *_mhead*: its tables' Feature1 .. Feature5 columns.
    LinearProtocol('mhead', epochs=90, lr_steps=(30, 60), augmentation='resized_crop_colour', **MHEAD),
    # Evaluated after epochs 10 and 20 there, and not after 28: which of them the table shows is not known.
    LinearProtocol(
        'mhead_places205', epochs=28, lr_steps=(7, 14, 21), augmentation='random_crop', report_epochs=(20,), **MHEAD),
    LinearProtocol('mhead_inat18', epochs=84, lr_steps=(24, 48, 72), augmentation='resized_crop', **MHEAD),
)}


# VOC07 SVM and low-shot SVM, MMSelfSup v0.9.1.
SVM_COSTS = (1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20)))  # in this order: the first of equals is taken
LINEAR_SVC = dict(
    class_weight={1: 2, -1: 1}, intercept_scaling=1.0, penalty='l2', loss='squared_hinge', tol=1e-4, dual=True,
    max_iter=2000)
SVM_FOLDS = 3
LOW_SHOT_NEGATIVES = 19  # low-shot: for each positive
SVM_COST_AT_K1 = 1.0  # honest choice at k = 1, where nothing can be held out
SVM_AP = 'envelope at all points (mAP); 11-point beside it'
SVM_TAPS = ('feat1', 'feat2', 'feat3', 'feat4', 'feat5')
LOW_SHOT_KS = (1, 2, 4, 8, 16, 32, 64, 96)
LOW_SHOT_DRAWS = 5

# Semi-supervised ImageNet, MMSelfSup v0.9.1.
SEMI_WEIGHT_DECAY = {'semi_1pct': 5e-4, 'semi_10pct': 1e-4}
SEMI_LRS, SEMI_HEAD_MULTIPLIERS = (0.1, 0.01, 0.001), (1.0, 10.0, 100.0)  # the nine pairs of the protocol
SEMI = {'epochs': 20, 'batch_size': 256}
