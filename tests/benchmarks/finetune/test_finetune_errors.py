"""What a user of `simsiam finetune` gets wrong is one sentence, before anything is written."""
import shutil
from pathlib import Path

import pytest
from conftest import write_digits
from tiny_finetune import PLAIN, TINY, parse

from simsiam_models.benchmarks.finetune import command


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp('photos'), 300)


@pytest.mark.parametrize('args, said', [
    (['--model', 'no_such_model:random', '--model-args', '{}'], 'no_such_model'),
    (['--opt', 'nonsense'], '--opt nonsense'),
    (['--randaugment', 'nonsense'], '--randaugment nonsense: not as timm writes it'),
    (['--epochs', '0'], '--epochs 0: must be at least 1'),
    (['--batch-size', '31'], '--batch-size 31 does not divide by 2'),
    (['--layer-decay', '1.5'], '--layer-decay 1.5'), (['--warmup-epochs', '6'], '--warmup-epochs 6: must be 0'),
    (['--val-share', '1'], '--val-share 1'), (['--resize', '16'], '--resize 16: must be at least the image size, 32'),
    (['--crop-scale', '0', '1'], '--crop-scale'), (['--grid'], '--grid belongs to --protocol'),
    (['--list', 'x'], '--list belongs to --protocol'), (['--seed', '-1'], '--seed -1'),
    (['--head-multiplier', '0'], '--head-multiplier belongs to --protocol'),
    (['--opt', 'fusedadam'], '--opt fusedadam: cannot be used .*; use adamw or sgd'),
    (['--opt', 'adahessian'], '--opt adahessian: cannot be used .it needs second derivatives'),
    (['--model', 'test_vit2:random', '--model-args', '{"dynamic_img_size": false}'],
     r'does not run on images of 32 px .*; give another --image-size, or --model-args \'{"img_size": 32}\''),
    (['--model', 'test_vit:random', '--model-args', '{"global_pool": ""}'],
     r'returns \(1, .* for an image, not a row of 10 classes'),
    (['--model-args', '{"no_such_argument": 1}'], 'no_such_argument'),
    (['--protocol', 'semi_1pct'], 'is fixed by --protocol semi_1pct; leave it out')])
def test_a_wrong_flag_is_one_sentence_before_anything_is_written(
    args: list[str], said: str, photos: Path, tmp_path: Path,
):
    with pytest.raises((ValueError, RuntimeError), match=said) as e:
        command.run(parse(photos, '--out', tmp_path / 'run', *PLAIN, *args))
    assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


def test_wrong_data_are_one_sentence(photos: Path, tmp_path: Path):
    shutil.copytree(photos / '0', tmp_path / 'one' / '0')
    shutil.copytree(photos / '0', tmp_path / 'flat')
    (tmp_path / 'empty').mkdir()
    for c in 'ab':
        (tmp_path / 'alone' / c).mkdir(parents=True)
        shutil.copy(next(photos.rglob('*.png')), tmp_path / 'alone' / c)
    for name, said in (('one', 'only one class'), ('flat', 'no labels'), ('empty', 'no image'), ('none', 'no such'),
                       ('alone', 'no class has two images')):
        with pytest.raises((ValueError, FileNotFoundError), match=said) as e:
            command.run(parse(tmp_path / name, '--out', tmp_path / 'run', *PLAIN))
        assert '\n' not in str(e.value)
    lines = ['path,label', *(f'{p},{0 if i % 2 else 99999}' for i, p in enumerate(sorted(photos.rglob('*.png'))[:8]))]
    for name in ('train', 'val'):
        (tmp_path / f'{name}.csv').write_text('\n'.join(lines))
    said = "99998 of 100000 classes have no training image, the first is '1'; add images, number"
    with pytest.raises(ValueError, match=said):
        command.run(parse(tmp_path / 'train.csv', '--out', tmp_path / 'run', *PLAIN))
    protocol = ('--protocol', 'semi_1pct', '--dataset', 'folder')
    with pytest.raises(ValueError, match=said):
        command.run(parse(tmp_path / 'train.csv', '--out', tmp_path / 'run', *TINY, *protocol))
    assert not (tmp_path / 'run').exists()
