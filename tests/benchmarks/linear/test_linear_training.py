"""The training of linear classifiers: one process or many, one batch or pieces of it, and the plain loop."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from processes import spawn
from tiny_linear import CPU, MODEL, make_run, measure, read_record, write_split_digits
from torchvision import transforms

from simsiam_models.benchmarks.backbone import compute_maps, load_backbone, pool_stages
from simsiam_models.benchmarks.linear.heads import Heads
from simsiam_models.benchmarks.linear.images import Piece, finish
from simsiam_models.benchmarks.linear.training import check_batches, extract, summarize, train
from simsiam_models.benchmarks.protocols import LINEAR
from simsiam_models.runtime.distributed import World

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def split_digits(tmp_path_factory) -> Path:
    return write_split_digits(tmp_path_factory.mktemp('split_digits'))


@pytest.mark.parametrize(('protocol', 'expected'), [
    ('fair', {'top1': 60.0, 'top5': 81.0, 'top1_last': 50.0, 'top5_last': 82.0}),
    ('mmselfsup', {'top1': 50.0, 'top5': 82.0, 'top1_best': 60.0, 'top5_best': 81.0})])
def test_best_or_last_is_reported_and_the_other_beside_it(protocol, expected):
    """top-5 is that of the same epoch; of equals the first is the best; epochs without evaluation do not count."""
    history = [
        {'epoch': 1, 'top1': [40.0], 'top5': [83.0]}, {'epoch': 2}, {'epoch': 3, 'top1': [60.0], 'top5': [81.0]},
        {'epoch': 4, 'top1': [60.0], 'top5': [99.0]}, {'epoch': 5, 'top1': [50.0], 'top5': [82.0]}]
    assert summarize(history, LINEAR[protocol], ['']) == expected


def test_a_backbone_in_training_mode_is_put_into_evaluation_mode(split_digits):
    run = make_run(split_digits, 'fair')
    run.frozen.model.train()
    train(run)
    run.frozen.check_unchanged('fair')


def test_batch_norm_never_gets_one_image_and_the_size_that_is_named_works():
    """n = 7: of two the last batch has 1, of three, too."""
    with pytest.raises(ValueError, match='--batch-size 2: of 7 images the last batch.*use --batch-size 4$'):
        check_batches(7, 2, True)
    for n in range(2, 40):
        for batch in range(1, 45):
            sizes = {len(range(i, min(n, i + batch))) for i in range(0, n, batch)}
            if 1 not in sizes:
                check_batches(n, batch, True)
                continue
            with pytest.raises(ValueError, match=f'^--batch-size {batch}: of {n} images') as e:
                check_batches(n, batch, True)
            check_batches(n, int(str(e.value).split()[-1]), True)
            if batch > 1:
                check_batches(n, batch, False)  # the pooled maps of one image are values enough
    with pytest.raises(ValueError, match='^1 training image: the batch norm of the classifiers needs 2'):
        check_batches(1, 4, True)


@pytest.mark.parametrize('protocol', ['fair', 'mhead'])
def test_pieces_of_a_batch_make_the_step_of_the_whole(protocol, split_digits):
    ends = []
    for micro in (256, 7):
        run = make_run(split_digits, protocol, micro_batch=micro)
        train(run)
        ends.append((run.heads.state_dict(), run.history))
    for name, x in ends[0][0].items():
        torch.testing.assert_close(x, ends[1][0][name], rtol=1e-4, atol=1e-6)
    assert [e['loss'] for e in ends[0][1]] == pytest.approx([e['loss'] for e in ends[1][1]], rel=1e-5)


def _train(rank: int, data: Path) -> dict:
    out = {}
    for protocol in ('fair', 'mhead', 'moco'):
        world = World(rank, 2, CPU, dist.new_group(backend='gloo'))
        # Rank 0 decides for both when to save.
        run = make_run(data, protocol, world, minutes=10.0 if rank else 0.0)
        train(run)
        run.frozen.check_unchanged(protocol)
        out[protocol] = (run.heads.state_dict(), run.history)
    return out


def test_two_processes_compute_what_one_does(split_digits, tmp_path):
    both = spawn(_train, tmp_path, split_digits)
    for protocol in ('fair', 'mhead', 'moco'):
        run = make_run(split_digits, protocol)
        train(run)
        for state, history in (b[protocol] for b in both):
            for name, x in run.heads.state_dict().items():
                torch.testing.assert_close(state[name], x, rtol=1e-4, atol=1e-6)
            for a, b in zip(history, run.history, strict=True):
                assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
                assert a['train_top1'] == pytest.approx(b['train_top1']) and a.get('top1') == b.get('top1')
        for name, x in both[0][protocol][0].items():
            assert torch.equal(x, both[1][protocol][0][name])


def test_a_step_is_plain_sgd_on_the_summed_losses(split_digits):
    """One batch, written out: the same images, the five taps, batch norm, cross-entropy, Nesterov."""
    run = make_run(split_digits, 'mhead', batch_size=100, epochs=1)
    heads = Heads(run.frozen.shapes, run.classes, True, 0.01, 0)
    optimizer = torch.optim.SGD(heads.parameters(), 0.01, 0.9, weight_decay=1e-4, nesterov=True)
    (pieces,) = [list(run.train_images.epoch(0))]
    x = torch.cat([finish(p, CPU, run.frozen.backbone.mean, run.frozen.backbone.std) for p, _ in pieces])
    with torch.no_grad():
        flat = pool_stages(compute_maps(run.frozen.backbone, x), adaptive=True)
    labels = torch.from_numpy(run.train_labels[pieces[0][1]])
    loss = sum(F.cross_entropy(y, labels) for y in heads(flat))
    loss.backward()
    optimizer.step()
    train(run)
    assert run.history[0]['loss'] == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(heads.parameters(), run.heads.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_backbone_sees_rgb_scaled_by_its_own_statistics(split_digits):
    run = make_run(split_digits, 'fair')
    run.frozen.backbone.mean, run.frozen.backbone.std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    x = ((pixels / 255 - run.frozen.backbone.mean) / run.frozen.backbone.std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = load_backbone(MODEL).model(torch.from_numpy(x).float())
    (found,) = extract(run, Piece(np.arange(4), torch.from_numpy(pixels)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_feature_maps_at_224_pixels_are_pooled_as_published(split_digits):
    """Windows and their means by hand, zeros of the border included."""
    run = make_run(split_digits, 'mhead', image_size=224, resize=256)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = compute_maps(run.frozen.backbone, x)
    published = [(10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0)]  # kernel, stride, padding
    for m, y, (kernel_, stride, padding) in zip(maps, run.frozen.extract(x), published, strict=True):
        windows = F.pad(m, (padding,) * 4).unfold(2, kernel_, stride).unfold(3, kernel_, stride)
        torch.testing.assert_close(y, windows.mean((-1, -2)).flatten(1), rtol=1e-4, atol=1e-5)


def _plain_step(kind: str, w, g, buffer, rate, decay=0.1, momentum=0.9, trust=0.001):
    """-> the weight and the buffer after a step; kind: the protocol."""
    wn, gn = float(w.norm()), float(g.norm())
    r = trust * wn / (gn + decay * wn + 1e-8) if wn > 0 and gn > 0 else 1.0
    d = g + decay * w
    if kind == 'mmselfsup':
        buffer = momentum * buffer + rate * r * d
        return w - buffer, buffer
    d = r * d if kind == 'fair' else d
    buffer = momentum * buffer + d
    return w - rate * (d + momentum * buffer if kind == 'mhead' else buffer), buffer


@pytest.mark.parametrize(('protocol', 'lr', 'rates'), [
    ('fair', 400.0, [1, 0.75, 0.25]), ('mmselfsup', 50.0, [1, 0.75, 0.25]), ('moco', 0.5, [1, 0.1, 0.01]),
    ('mhead', 0.05, [1, 0.1, 0.01])])
def test_epochs_are_the_plain_loop_of_the_protocol(protocol, lr, rates, split_digits):
    """Weight decay, the falling rate, batch norm, loss and training accuracy, written out once more."""
    steps = {} if protocol in ('fair', 'mmselfsup') else {'lr_steps': (1, 2)}
    run = make_run(split_digits, protocol, epochs=3, lr=lr, weight_decay=0.1, eval_every=3, **steps)
    base = lr * 33 / 256 if protocol == 'fair' else lr
    weights = [p.detach().clone() for linear_ in run.heads.linears for p in (linear_.weight, linear_.bias)]
    first, buffers, history = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights], []
    for epoch in range(3):
        total, right = 0.0, np.zeros(len(weights) // 2)
        for piece, rows in run.train_images.epoch(epoch):
            x = finish(piece, CPU, run.frozen.backbone.mean, run.frozen.backbone.std)
            five, backbone = protocol == 'mhead', run.frozen.backbone
            with torch.no_grad():
                flat = pool_stages(compute_maps(backbone, x), adaptive=True) if five else [backbone.model(x)]
            labels, losses = torch.from_numpy(run.train_labels[rows]), []
            for w in weights:
                w.requires_grad_()
            for tap, f in enumerate(flat):
                if five:
                    f = f.reshape(len(f), run.frozen.shapes[tap][0], -1)  # (B, C, values)
                    f = (f - f.mean((0, 2), keepdim=True)) / (f.var((0, 2), False, keepdim=True) + 1e-5).sqrt()
                scores = f.flatten(1) @ weights[2 * tap].T + weights[2 * tap + 1]
                losses.append(-scores.log_softmax(1)[torch.arange(len(labels)), labels].mean())
                right[tap] += int((scores.argmax(1) == labels).sum())
            total += sum(losses).item() * len(labels)
            gradients = torch.autograd.grad(sum(losses), weights)
            with torch.no_grad():
                for i, g in enumerate(gradients):
                    weights[i], buffers[i] = _plain_step(
                        protocol, weights[i].detach(), g, buffers[i], base * rates[epoch])
        history.append((total / 100, right.tolist()))
    train(run)
    ours = [p.detach() for linear_ in run.heads.linears for p in (linear_.weight, linear_.bias)]
    for a, b, start in zip(ours, weights, first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float((b - start).abs().max()))
    for entry, (loss, right) in zip(run.history, history, strict=True):
        assert entry['loss'] == pytest.approx(loss, rel=1e-4) and entry['train_top1'] == pytest.approx(right)


@pytest.mark.parametrize('protocol', ['mmselfsup', 'mhead'])
def test_the_reported_accuracy_is_that_of_the_saved_classifiers(protocol, split_digits, tmp_path):
    measure(split_digits, tmp_path, protocol, '--resize', '40', '--lr', '30' if protocol != 'mhead' else '.1')
    (path,) = tmp_path.glob('*.pth')
    state, backbone = torch.load(path, weights_only=True)['heads'], load_backbone(MODEL)
    view = transforms.Compose([
        transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor(),
        transforms.Normalize(backbone.mean, backbone.std)])
    classes = sorted(p.name for p in (split_digits / 'train').iterdir())
    files = sorted((split_digits / 'val').rglob('*.*'))
    x = torch.stack([view(Image.open(f).convert('RGB')) for f in files])
    labels = torch.tensor([classes.index(f.parent.name) for f in files])
    with torch.no_grad():
        flat = pool_stages(compute_maps(backbone, x), adaptive=True) if protocol == 'mhead' else [backbone.model(x)]
    metrics = read_record(tmp_path)['metrics']
    for tap, f in enumerate(flat):
        if protocol == 'mhead':
            mean, var = (state[f'norms.{tap}.running_{k}'][:, None] for k in ('mean', 'var'))
            f = ((f.reshape(len(f), len(mean), -1) - mean) / (var + 1e-5).sqrt()).flatten(1)
        scores = f @ state[f'linears.{tap}.weight'].T + state[f'linears.{tap}.bias']
        found = (scores.topk(5).indices == labels[:, None]).float()
        name = f'feature{tap + 1}' if protocol == 'mhead' else 'top1'
        five = f'{name}_top5' if protocol == 'mhead' else 'top5'
        one = 100 / len(files)  # PIL 13 moves some pixels by a level
        assert metrics[name] == pytest.approx(100 * float(found[:, 0].mean()), abs=one + 1e-4)
        assert metrics[five] == pytest.approx(100 * float(found.sum(1).mean()), abs=one + 1e-4)
        assert metrics[five] > 20  # so that a tenth of it is more than one image
