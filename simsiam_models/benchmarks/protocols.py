"""The published evaluation protocols. Every number appears here once; the comments name its source.

MMSelfSup is open-mmlab/mmselfsup v0.9.1; paths are relative to that repository.
"""
from dataclasses import dataclass
from typing import Any

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


MHEAD: dict[str, Any] = dict(
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
LINEAR_SVC: dict[str, Any] = dict(
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
SEMI: dict[str, Any] = {'epochs': 20, 'batch_size': 256}  # a flag may change these
SEMI_FIXED: dict[str, Any] = {
    'optimizer': 'sgd', 'momentum': 0.9, 'steps': (12, 16), 'crop_scale': (0.08, 1.0), 'flip': 0.5, 'eval_every': 10}
SEMI_LR_GAMMA = 0.2  # the rate is multiplied by it after each of the steps
SEMI_WEIGHT_DECAY = {'semi_1pct': 5e-4, 'semi_10pct': 1e-4}
SEMI_LRS, SEMI_HEAD_MULTIPLIERS = (0.1, 0.01, 0.001), (1.0, 10.0, 100.0)  # of the backbone; of the classifier's rate

# Detection: configs/benchmarks/mmdetection of MMSelfSup, which run mmdet 2.25; facebookresearch/moco, detection/, which
# runs detectron2. Where the two differ, a variant is one or the other in everything.


@dataclass(frozen=True, kw_only=True)
class DetectionVariant:
    """What the frameworks do differently."""

    best_anchors: str  # `boxes.match`: of an object, the anchors that overlap it most
    inside: bool  # anchors in the batch's padding and, in C4, those that leave the image are not trained
    size_major: bool  # order of a cell's anchors
    divide_by_drawn: bool  # the RPN's losses by the anchors drawn, or by `rpn_samples` for each image
    rank_logits: bool  # proposals by logits, or by probabilities, of which the highest are all 1
    clamp_below: bool  # `boxes.decode`
    objects_first: bool  # objects join the proposals before them, unmatched, or behind them
    rescale_first: bool  # detections get the image's original size before NMS, or behind it
    divisor: int  # sides of the padded images are its multiples
    antialias: bool  # resized as PIL does it, or OpenCV
    difficult: bool  # VOC: difficult objects are positives, or background
    decay_norms: bool  # weight decay on batch norms
    precise_bn: int  # iterations that measure the batch norms' statistics before an evaluation


DETECTION_VARIANTS = {
    'mmdet': DetectionVariant(
        best_anchors='floor', inside=True, size_major=False, divide_by_drawn=True, rank_logits=False,
        clamp_below=True, objects_first=True, rescale_first=True, divisor=32, antialias=False, difficult=False,
        decay_norms=True, precise_bn=0),
    'detectron2': DetectionVariant(
        best_anchors='always', inside=False, size_major=True, divide_by_drawn=False, rank_logits=True,
        clamp_below=False, objects_first=False, rescale_first=False, divisor=1, antialias=True, difficult=True,
        decay_norms=False, precise_bn=200)}


@dataclass(frozen=True, kw_only=True)
class DetectorNumbers:
    """The numbers of a detector; the defaults hold for all three."""

    variant: str = 'mmdet'
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width of anchors
    scales: tuple[float, ...]  # of anchors, in strides
    strides: tuple[int, ...]  # of the maps with anchors
    inside: bool  # whether the variant's rule of anchors that leave the image applies
    rpn_iou: tuple[float, float] = (0.3, 0.7)  # negative below, positive from
    rpn_samples: int = 256  # anchors per image
    rpn_share: float = 0.5  # of positives, at most
    train_proposals: tuple[int, int]  # per map before NMS, per image behind it
    test_proposals: tuple[int, int]
    rpn_nms: float = 0.7
    roi_iou: float = 0.5
    best_rois: str  # `boxes.match`
    rois: int = 512  # per image in training
    roi_share: float = 0.25
    pool_size: int  # cells per side of a RoI
    box_stds: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)
    mask_size: int = 0  # cells per side of a RoI for the mask head; 0: there is none, or it shares the box head's
    score: float = 0.05  # detections need a higher one
    nms: float = 0.5
    detections: int = 100  # per image

    @property
    def rules(self) -> DetectionVariant:
        return DETECTION_VARIANTS[self.variant]


C4: dict[str, Any] = dict(
    scales=(2.0, 4.0, 8.0, 16.0, 32.0), strides=(16,), inside=True, train_proposals=(12000, 2000),
    test_proposals=(6000, 1000), best_rois='none', pool_size=14)
DETECTORS = {
    'fasterrcnn_c4': DetectorNumbers(**C4),  # _base_/models/faster_rcnn_r50_c4.py
    'maskrcnn_c4': DetectorNumbers(**C4),  # coco/mask_rcnn_r50_c4_mstrain_1x_coco.py
    # coco/mask_rcnn_r50_fpn_mstrain_1x_coco.py
    'maskrcnn_fpn': DetectorNumbers(
        scales=(8.0,), strides=(4, 8, 16, 32, 64), inside=False, train_proposals=(2000, 1000),
        test_proposals=(1000, 1000), best_rois='floor', pool_size=7, mask_size=14)}


@dataclass(frozen=True, kw_only=True)
class DetectionProtocol:
    """How a detector is trained and measured."""

    benchmark: str  # its name in weights/published.json
    detector: str  # a key of DETECTORS
    dataset: str  # a key of datasets.sizes.SIZES
    batch_size: int = 16  # images per iteration, over all processes
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    iterations: int | None = None
    epochs: int | None = None  # instead of iterations
    lr_steps: tuple[int, ...]  # iterations, or epochs, after which the rate is multiplied by lr_gamma
    lr_gamma: float = 0.1
    warmup: int  # iterations
    warmup_ratio: float = 0.001
    short_sides: tuple[int, ...]  # pixels, one of which is drawn for each training image
    test_side: int = 800
    long_side: int = 1333  # at most
    flip_p: float = 0.5
    eval_every: int  # iterations, or epochs


COCO: dict[str, Any] = dict(dataset='coco', warmup=1000, short_sides=(640, 672, 704, 736, 768, 800), eval_every=1)
COCO_1X: dict[str, Any] = dict(epochs=12, lr_steps=(8, 11), **COCO)
COCO_2X: dict[str, Any] = dict(epochs=24, lr_steps=(16, 22), **COCO)
DETECTION = {
    # voc0712/faster_rcnn_r50_c4_mstrain_24k_voc0712.py; moco: detection/configs/pascal_voc_R_50_C4_24k_moco.yaml
    'voc0712_c4_24k': DetectionProtocol(
        benchmark='voc0712_faster_rcnn_c4_24k', detector='fasterrcnn_c4', dataset='voc0712', iterations=24000,
        lr_steps=(18000, 22000), warmup=100, short_sides=tuple(range(480, 801, 32)), eval_every=2000),
    # coco/mask_rcnn_r50_{fpn,c4}_mstrain_{1x,2x}_coco.py
    'coco_fpn_1x': DetectionProtocol(
        benchmark='coco_mask_rcnn_r50_fpn_ms_1x', detector='maskrcnn_fpn', **COCO_1X),
    'coco_fpn_2x': DetectionProtocol(
        benchmark='coco_mask_rcnn_r50_fpn_ms_2x', detector='maskrcnn_fpn', **COCO_2X),
    'coco_c4_1x': DetectionProtocol(benchmark='coco_mask_rcnn_r50_c4_ms_1x', detector='maskrcnn_c4', **COCO_1X),
    'coco_c4_2x': DetectionProtocol(benchmark='coco_mask_rcnn_r50_c4_ms_2x', detector='maskrcnn_c4', **COCO_2X)}

# Segmentation: configs/benchmarks/mmsegmentation of MMSelfSup, which run mmsegmentation 0.24.1.


@dataclass(frozen=True, kw_only=True)
class SegmentationProtocol:
    """How FCN-D8 is trained and measured. Where the protocols agree, the numbers are the defaults."""

    benchmark: str  # its name in weights/published.json, if it has one there
    dataset: str  # a key of datasets.sizes.SIZES
    # Network: the decode head has two convolutions and one behind the concatenation, the auxiliary head has one.
    channels: int = 512  # of the decode head
    aux_channels: int = 256
    dropout: float = 0.1  # of channels, before the classes
    aux_weight: float = 0.4  # of the auxiliary loss
    align_corners: bool  # of every bilinear resizing of logits
    loss_mean: str = 'all'  # the loss is a mean over all pixels, also ignored ones; or 'valid'
    # Images that train, in this order
    box: tuple[int, int]  # long and short side of the box that an image is resized to fit in, times a ratio; in tests 1
    ratios: tuple[float, float] = (0.5, 2.0)
    crop: int  # pixels
    cat_max_ratio: float = 0.75  # a crop in which a class has this share of the labelled pixels is drawn again
    redraws: int = 10  # at most; the last one is used as it is
    flip_p: float = 0.5
    brightness: int = 32  # levels; each of the four changes of colours has a probability of a half
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18  # of 180 levels
    # Test: the whole image, or windows
    test: str  # 'whole', 'slide'
    stride: int  # pixels between windows of the size of a crop
    # Optimizer
    batch_size: int  # images per iteration, over all processes; an incomplete last batch of an epoch is dropped
    iterations: int
    lr: float = 0.01
    floor: float = 1e-4  # (lr - floor) * (1 - i / iterations) ** power + floor
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 5e-4
    eval_every: int  # iterations


SEGMENTATION = {
    # voc12aug/fcn_r50-d8_512x512_20k_voc12aug.py; it has no windows: their stride is that of other configurations
    'voc12aug_20k': SegmentationProtocol(
        benchmark='voc12aug_fcn_r50_d8_512_20k', dataset='voc12aug', align_corners=False, box=(2048, 512), crop=512,
        test='whole', stride=341, batch_size=16, iterations=20000, eval_every=2000),
    # cityscapes/fcn_r50-d8_769x769_40k_cityscapes.py
    'cityscapes_40k': SegmentationProtocol(
        benchmark='cityscapes_fcn_r50_d8_769_40k', dataset='cityscapes', align_corners=True, box=(2049, 1025), crop=769,
        test='slide', stride=513, batch_size=8, iterations=40000, eval_every=4000)}
