"""FCN-D8: its size, the dilation of every block, its losses by hand, whole images and windows."""
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam_models.benchmarks import segmentation
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.protocols import SEGMENTATION
from simsiam_models.benchmarks.segmentation.inference import Inference, compute_logits, list_windows, segment
from simsiam_models.benchmarks.segmentation.model import Segmenter
from simsiam_models.benchmarks.transfer import Schedule, TransferTrainer, compute_lr
from simsiam_models.runtime.distributed import World

TINY = {'layers': [1, 1, 1, 1], 'channels': [8, 16, 24, 32], 'stem_width': 8, 'stem_type': 'deep'}
pytestmark = pytest.mark.usefixtures('one_thread')


def build(classes: int = 5, **changes) -> Segmenter:
    return segmentation.build('resnet18:random', classes, model_args=TINY, channels=(12, 6), **changes)


# --- the network

@pytest.mark.parametrize(('classes', 'parameters'), [(21, 49_480_042), (19, 49_478_502)])
def test_the_network_has_the_size_of_the_pages_configurations(classes: int, parameters: int):
    segmenter = segmentation.build('simsiam_resnet50:random', classes)
    assert sum(p.numel() for p in segmenter.parameters()) == parameters
    assert sum(isinstance(m, nn.BatchNorm2d) for m in segmenter.modules()) == 57
    assert segmenter.describe().startswith(f'FCN-D8: {parameters:,} parameters and 57 batch norms')


def test_every_block_has_the_stride_and_dilation_of_a_contracted_resnet_d8():
    backbone = segmentation.build('simsiam_resnet50:random', 2).backbone
    found = [[(b.conv2.stride[0], b.conv2.dilation[0], b.conv2.padding[0], b.downsample and b.downsample[0].stride[0])
              for b in getattr(backbone, f'layer{i}')] for i in range(1, 5)]
    assert found == [
        [(1, 1, 1, 1), (1, 1, 1, None), (1, 1, 1, None)],
        [(2, 1, 1, 2), *[(1, 1, 1, None)] * 3],
        [(1, 1, 1, 1), *[(1, 2, 2, None)] * 5],  # the first block has half the dilation of its stage
        [(1, 2, 2, 1), (1, 4, 4, None), (1, 4, 4, None)]]
    maps = backbone.eval().forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True)
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 8, 8]


def test_the_heads_have_the_parts_and_names_of_mmsegmentations():
    segmenter = segmentation.build('simsiam_resnet50:random', 21)
    shapes = {k: tuple(v.shape) for k, v in segmenter.state_dict().items() if 'head' in k and k.endswith('weight')}
    assert shapes == {
        'decode_head.conv_seg.weight': (21, 512, 1, 1),
        'decode_head.convs.0.conv.weight': (512, 2048, 3, 3), 'decode_head.convs.0.bn.weight': (512,),
        'decode_head.convs.1.conv.weight': (512, 512, 3, 3), 'decode_head.convs.1.bn.weight': (512,),
        'decode_head.conv_cat.conv.weight': (512, 2560, 3, 3), 'decode_head.conv_cat.bn.weight': (512,),
        'auxiliary_head.conv_seg.weight': (21, 256, 1, 1),
        'auxiliary_head.convs.0.conv.weight': (256, 1024, 3, 3), 'auxiliary_head.convs.0.bn.weight': (256,)}
    std = segmenter.decode_head.conv_seg.weight.std().item()
    assert std == pytest.approx(0.01, rel=0.05) and not segmenter.decode_head.conv_seg.bias.any()
    fan_out = 512 * 9
    assert segmenter.decode_head.convs[0].conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.01)


def test_the_backbone_is_whole_and_everything_trains():
    segmenter, source = build(), load_backbone('resnet18:random', output_stride=8, **TINY)
    assert all(torch.equal(v, segmenter.backbone.state_dict()[k]) for k, v in source.model.state_dict().items())
    for m in segmenter.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)  # of the last in each block: timm's are 0, which stops the gradient
    losses = segmenter.losses(torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32)))
    (losses['decode'] + losses['aux']).backward()
    assert [n for n, p in segmenter.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_heads_are_a_function_of_the_seed():
    a, b, c = (build(seed=s).decode_head.convs[0].conv.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(('make', 'said'), [
    (lambda: segmentation.build('vit_tiny_patch16_224:random'), 'need a ResNet of timm'),
    (lambda: segmentation.build(load_backbone('resnet18:random')), r'strides \[4, 8, 16, 32\].*output_stride=8'),
    (lambda: segmentation.build('resnet18:random', model_args={'output_stride': 16}), 'leave it out of --model-args'),
    (lambda: segmentation.build('resnet18:random', 1), '2 to 255 are possible'),
    (lambda: segmentation.build('resnet18:random', 256), '2 to 255 are possible'),
    (lambda: segmentation.build('resnet18:random', ['a', 'b', 'a']), '3 classes, 2 of them different'),
    (lambda: segmentation.build('resnet18:random', loss_mean='some'), 'one of all, valid')])
def test_what_cannot_be_built_is_refused(make, said: str):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_checkpoint_that_does_not_fill_the_backbone_is_refused(tmp_path: Path):
    state = load_backbone('resnet18:random').model.state_dict()
    del state['layer3.0.conv1.weight']
    torch.save(state, tmp_path / 'part.pth')
    with pytest.raises(ValueError, match='part.pth'):
        segmentation.build(str(tmp_path / 'part.pth'))


# --- losses

def entropies(logits: Tensor, masks: Tensor) -> Tensor:
    """-log softmax of each labelled pixel, written out; 0 for ignored ones."""
    exp = logits.double().exp()
    share = exp / exp.sum(1, keepdim=True)
    out = torch.zeros(masks.shape, dtype=torch.float64)
    for b, y, x in torch.argwhere(masks != 255).tolist():
        out[b, y, x] = -share[b, masks[b, y, x], y, x].log()
    return out


@pytest.mark.parametrize('align_corners', [False, True])
def test_the_loss_is_a_mean_over_all_pixels_or_over_the_valid_ones(align_corners: bool):
    torch.manual_seed(0)
    images, masks = torch.randn(2, 3, 24, 24), torch.randint(0, 5, (2, 24, 24))
    masks[0, 3:], masks[1, :, :5] = 255, 255
    valid = int((masks != 255).sum())
    segmenter = build(align_corners=align_corners).eval()
    with torch.no_grad():
        before_aux, before = segmenter.compute_maps(images)
        for name, head, x in (('decode', segmenter.decode_head, before), ('aux', segmenter.auxiliary_head, before_aux)):
            logits = F.interpolate(head(x), (24, 24), mode='bilinear', align_corners=align_corners)
            total = entropies(logits, masks).sum().item()
            segmenter.loss_mean = 'all'
            assert segmenter.losses(images, masks)[name].item() == pytest.approx(total / masks.numel(), rel=1e-5)
            segmenter.loss_mean = 'valid'
            assert segmenter.losses(images, masks)[name].item() == pytest.approx(total / valid, rel=1e-5)
            assert F.cross_entropy(logits, masks, ignore_index=255).item() == pytest.approx(total / valid, rel=1e-5)


@pytest.mark.parametrize('loss_mean', ['all', 'valid'])
def test_masks_that_are_ignored_as_a_whole_have_a_loss_of_zero(loss_mean: str):
    losses = build(loss_mean=loss_mean).losses(torch.randn(2, 3, 16, 16), torch.full((2, 16, 16), 255))
    assert all(x.item() == 0 for x in losses.values())


def test_channels_drop_out_by_the_numbers_given_and_are_scaled():
    segmenter = build(dropout=0.25)
    images, masks = torch.randn(2, 3, 16, 16), torch.randint(0, 5, (2, 16, 16))
    kept = torch.full((2, 18), 0.5)
    once, again = (segmenter.losses(images, masks, kept) for _ in range(2))
    assert torch.equal(once['decode'], again['decode'])
    dropped = kept.clone()
    dropped[:, :12] = 0.2  # all of the decode head's: the classes' bias is left, which is 0
    assert segmenter.losses(images, masks, dropped)['decode'].item() == pytest.approx(math.log(5), rel=1e-6)
    assert torch.equal(segmenter.losses(images, masks, dropped)['aux'], once['aux'])
    x, without = torch.randn(2, 32, 2, 2), build(dropout=0).decode_head
    assert torch.allclose(segmenter.decode_head(x, kept[:, :12]), without(x) / 0.75, atol=1e-6)  # before a bias of 0
    segmenter.eval()
    assert torch.equal(segmenter.losses(images, masks)['decode'], segmenter.losses(images, masks, dropped)['decode'])


@pytest.mark.parametrize(('images', 'masks', 'said'), [
    (torch.zeros(1, 3, 8, 8), torch.full((1, 8, 8), 5), 'labels 5 to 5, but the classes are 0 to 4'),
    (torch.zeros(1, 3, 8, 8), torch.full((1, 8, 8), -1), 'labels -1 to -1'),
    (torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 9).long(), r'masks \(1, 8, 8\) of integers'),
    (torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8), 'of integers are needed, not .* of torch.float32'),
    (torch.zeros(3, 8, 8), torch.zeros(1, 8, 8).long(), r'images \(B, 3, H, W\)')])
def test_batches_that_do_not_fit_are_refused(images: Tensor, masks: Tensor, said: str):
    with pytest.raises(ValueError, match=said):
        build().losses(images, masks)


@pytest.mark.parametrize('amp', ['off', 'bfloat16'])
def test_a_step_lowers_the_loss_and_weighs_the_auxiliary_one(amp: str):
    torch.manual_seed(0)
    schedule = Schedule(iterations=8, batch_size=4, lr=0.1, momentum=0.9, weight_decay=0, power=0.9, eval_every=8)
    segmenter = build(dropout=0)
    trainer = TransferTrainer(
        segmenter, schedule, World(0, 1, torch.device('cpu')), amp, tuple, weights={'aux': 0.4})
    images = torch.randn(4, 3, 32, 32)
    masks = torch.randint(0, 5, (4, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    losses = [trainer.step((images, masks), i) for i in range(8)]
    assert losses[-1]['decode'] < losses[0]['decode'] and losses[-1]['aux'] < losses[0]['aux']
    assert losses[0]['decode'].dtype == torch.float32
    if amp == 'off':  # the gradient of the first step is that of decode + .4 aux
        fresh = build(dropout=0)
        start = fresh.losses(images, masks)
        (start['decode'] + 0.4 * start['aux']).backward()
        again = TransferTrainer(build(dropout=0), schedule, World(0, 1, torch.device('cpu')), 'off', tuple,
                                weights={'aux': 0.4})
        again.step((images, masks), 0)
        for p, q in zip(fresh.parameters(), again.model.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-7)


@pytest.mark.parametrize(('name', 'last'), [('voc12aug_20k', 20000), ('cityscapes_40k', 40000)])
def test_the_rate_falls_by_the_published_power_to_its_floor(name: str, last: int):
    p = SEGMENTATION[name]
    s = Schedule(iterations=last, batch_size=16, lr=p.lr, momentum=0.9, weight_decay=0, power=p.power, floor=p.floor,
                 eval_every=1)
    assert compute_lr(s, 0) == pytest.approx(0.01)
    assert compute_lr(s, last // 2) == pytest.approx(0.0099 * 0.5**0.9 + 1e-4)
    assert compute_lr(s, last - 1) == pytest.approx(0.0099 * (1 / last)**0.9 + 1e-4)


# --- prediction

def test_a_whole_image_is_resized_twice_as_in_mmsegmentation():
    torch.manual_seed(0)
    segmenter, image = build().eval(), torch.randn(3, 20, 28)
    with torch.no_grad():
        small = segmenter.decode_head(segmenter.compute_maps(image[None])[1])
        logits = F.interpolate(F.interpolate(small, (20, 28), mode='bilinear'), (31, 45), mode='bilinear')
    found = segment(segmenter, image, (31, 45), Inference(box=(28, 20), test='whole', crop=8, stride=8))
    assert torch.equal(torch.from_numpy(found).long(), logits[0].argmax(0)) and found.shape == (31, 45)


def test_windows_cover_an_image_and_the_last_ones_lie_inside():
    cityscapes = [(y.start, y.stop, x.start, x.stop) for y, x in list_windows(1025, 2049, 769, 513)]
    assert cityscapes == [(top, top + 769, left, left + 769) for top in (0, 256) for left in (0, 513, 1026, 1280)]
    assert [(y.start, y.stop, x.start, x.stop) for y, x in list_windows(5, 8, 6, 4)] == [(0, 5, 0, 6), (0, 5, 2, 8)]
    assert [(x.start, x.stop) for _, x in list_windows(6, 6, 6, 4)] == [(0, 6)]
    assert [x.start for _, x in list_windows(4, 13, 4, 3)] == [0, 3, 6, 9]


class Numbered:
    """Every call gives the same logits everywhere: 1, 2, 3, ..."""

    names, align_corners = ['a', 'b'], True

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def compute_logits(self, images: Tensor) -> Tensor:
        self.sizes.append(tuple(images.shape[2:]))
        return torch.full((1, 2, *images.shape[2:]), float(len(self.sizes)))


def test_logits_of_windows_are_averaged_where_they_overlap():
    network = Numbered()
    logits = compute_logits(network, torch.zeros(3, 4, 10), Inference(box=(10, 4), test='slide', crop=4, stride=3))
    assert network.sizes == [(4, 4)] * 3
    assert logits[0, 0].tolist() == [1, 1, 1, 1.5, 2, 2, 2.5, 3, 3, 3]


def test_one_window_of_the_size_of_the_image_is_the_whole_image():
    torch.manual_seed(0)
    segmenter, image = build(align_corners=True).eval(), torch.randn(3, 24, 24)
    whole, window = (compute_logits(segmenter, image, Inference(box=(24, 24), test=test, crop=24, stride=16))
                     for test in ('whole', 'slide'))
    assert torch.allclose(whole, window, atol=1e-6)
