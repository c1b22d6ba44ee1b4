"""The README.md of a Hub repository: what the weights are, how to use them, and whose numbers they carry."""
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .published import WEIGHTS, published, same_page

# Benchmark in published.json -> title, the Hub's task type, the Hub's id and the name of the data set.
BENCHMARKS = {
    'imagenet_linear': ('ImageNet linear probe, top-1', 'image-classification', 'imagenet-1k', 'ImageNet-1k'),
    'imagenet_linear_avgpool': ('ImageNet linear probe, top-1', 'image-classification', 'imagenet-1k', 'ImageNet-1k'),
    'imagenet_mhead_linear': ('ImageNet linear probes on five taps, top-1', 'image-classification', 'imagenet-1k',
                              'ImageNet-1k'),
    'imagenet_knn_T0.07': ('ImageNet kNN, top-1', 'image-classification', 'imagenet-1k', 'ImageNet-1k'),
    'places205_mhead_linear': ('Places205 linear probes on five taps, top-1', 'image-classification', 'places205',
                               'Places205'),
    'voc07_svm_feature5': ('VOC2007 SVM', 'image-classification', 'voc2007', 'PASCAL VOC 2007'),
    'voc07_lowshot_svm_feature5': ('VOC2007 low-shot SVM, mAP', 'image-classification', 'voc2007', 'PASCAL VOC 2007'),
    'voc0712_faster_rcnn_c4_24k': ('VOC2007+2012 detection', 'object-detection', 'voc0712', 'PASCAL VOC 2007+2012'),
    'coco_mask_rcnn_r50_fpn_ms_1x': ('COCO detection and instance segmentation', 'object-detection', 'coco',
                                     'COCO 2017'),
    'voc12aug_fcn_r50_d8_512_20k': ('VOC2012 segmentation', 'image-segmentation', 'voc2012', 'PASCAL VOC 2012 + SBD'),
}
PUBLISHERS = {
    'fb': 'Facebook AI Research (facebookresearch/simsiam)', 'mm': 'OpenMMLab (MMSelfSup 0.x)',
    'mm1x': 'OpenMMLab (MMSelfSup 1.x, MMPretrain)'}
CITATION = '''```bibtex
@article{chen2020simsiam,
  title   = {Exploring Simple Siamese Representation Learning},
  author  = {Xinlei Chen and Kaiming He},
  journal = {arXiv preprint arXiv:2011.10566},
  year    = {2020}
}
```'''
BGR_NOTE = '''## Blue comes first

These weights were trained on BGR pixels with RGB statistics (the loader of MMSelfSup 0.5 and 0.6; inferred from the
dates in that repository's history). Give them images with the channels in the order blue, green, red, normalized with
the mean and std of config.json in the order in which they stand there; or adapt the model to RGB images once:

```python
model.conv1.weight.data = model.conv1.weight.data.flip(1)
mean, std = mean[::-1], std[::-1]
```

Their published transfer results were measured with RGB pixels all the same. Prefer `{current}`, unless you need this
very file.'''


def model_card(
    tag: str, repo: str, config: dict[str, Any], parameters: int, upstream: str, heads: bool, license: str,
) -> str:
    """README.md with its front matter.

    Args:
        tag: a key of WEIGHTS; any other tag gets a card without published numbers.
        repo: the Hub id.
        config: the content of config.json.
        parameters: of model.safetensors.
        upstream: the sentence that says which file the weights come from and whether it was checked.
        heads: is there a heads.safetensors?
    """
    sections = [_head(tag, repo, config), _details(tag, config, parameters, upstream, license)]
    if '_bgr_' in tag:
        sections.append(BGR_NOTE.format(current=tag.replace('_bgr', '')))
    sections += [_usage(tag, repo, config, heads), _results(tag), f'## Citation\n\n{CITATION}']
    front_matter = _data(tag, repo, config, license).to_yaml(line_break='\n')
    return '\n\n'.join([f'---\n{front_matter}\n---', *sections]) + '\n'


def _is_ours(config: dict[str, Any]) -> bool:
    """An architecture that timm and transformers do not have without this package."""
    return config['architecture'].startswith('simsiam_')


def _data(tag: str, repo: str, config: dict[str, Any], license: str) -> ModelCardData:
    weights = WEIGHTS.get(tag)
    return ModelCardData(
        library_name='timm', license=license,
        tags=['timm', *([] if _is_ours(config) else ['transformers']), 'simsiam', 'self-supervised'],
        pipeline_tag='image-classification' if config['num_classes'] else 'image-feature-extraction',
        datasets=['imagenet-1k'] if weights else None,
        base_model=repo.replace('_lin_in1k', '_in1k') if weights and weights.num_classes else None,
        model_name=repo.split('/')[-1], eval_results=_eval_results(tag) or None)


def _eval_results(tag: str) -> list[EvalResult]:
    """The published numbers of this very file; those of other files on the same page stay out of the metadata."""
    results = []
    for entry in published(tag):
        title, task, dataset, dataset_name = BENCHMARKS[entry['benchmark']]
        for metric, value in entry['metrics'].items():
            if metric == 'mIoU_first_report':  # the same measurement, as first reported
                continue
            # dataset_config: the Hub client merges results of one task, data set and config, and keeps one source.
            results.append(EvalResult(
                task_type=task, task_name=title, dataset_type=dataset, dataset_name=dataset_name,
                dataset_config=entry['benchmark'], metric_value=value,
                metric_type={'top-1': 'accuracy', 'mAP': 'mAP'}.get(title.split(', ')[-1], metric),
                metric_name=title if metric == 'top1' else f'{title}: {metric}',
                source_name=entry['source'], source_url=entry['url']))
    return results


def _head(tag: str, repo: str, config: dict[str, Any]) -> str:
    weights = WEIGHTS.get(tag)
    network = 'ResNet-50' if config['architecture'] == 'resnet50' else config['architecture']
    what = f'A {network} pretrained by SimSiam'
    if weights:
        what += f' on ImageNet-1k ({weights.epochs} epochs, batch {weights.batch})'
    classifier = f', with a linear classifier of {config["num_classes"]} classes on its frozen features'
    return f'# {repo.split("/")[-1]}\n\n{what}{classifier if config["num_classes"] else ", without a classifier"}.'


def _details(tag: str, config: dict[str, Any], parameters: int, upstream: str, license: str) -> str:
    weights = WEIGHTS.get(tag)
    rows = [
        ('Model type', f'image {"classifier" if config["num_classes"] else "feature backbone"}, '
                       f'{parameters / 1e6:.1f}M parameters, {config["num_features"]} features'),
        ('Image size', f'{config["pretrained_cfg"]["input_size"][-1]} px'),
        ('Method', 'SimSiam, Exploring Simple Siamese Representation Learning, https://arxiv.org/abs/2011.10566'),
    ]
    if weights:
        rows += [
            ('Pretraining', f'ImageNet-1k without labels, {weights.epochs} epochs, batch {weights.batch}'),
            ('Published by', PUBLISHERS[tag.split('_')[0]]),
            ('Original file', weights.url),
        ]
        if tag.startswith('mm_'):
            order = 'BGR with RGB statistics' if '_bgr_' in tag else 'RGB'
            rows.append(('Pixels in pretraining', f'{order} (inferred from the dates of the log and of a bug fix)'))
    terms = license + (': **no commercial use**' if '-nc' in license else '')
    rows += [('Origin of this file', upstream),
             ('License', terms + (', the license of the repository that published them' if weights else ''))]
    return '## Model details\n\n' + '\n'.join(f'- **{name}:** {value}' for name, value in rows)


def _usage(tag: str, repo: str, config: dict[str, Any], heads: bool) -> str:
    out = f'(1, {config["num_classes"]}) logits' if config['num_classes'] else f'(1, {config["num_features"]}) features'
    auto = 'AutoModelForImageClassification' if config['num_classes'] else 'AutoModel'
    name = repo.split('/')[-1]
    pixels = 'blue channel first' if '_bgr_' in tag else 'RGB'
    ours = _is_ours(config)
    blocks = [f'''{'With timm and simsiam_models' if ours else 'With timm alone'}:

```python
import {'simsiam_models, timm' if ours else 'timm'}
import torch

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    output = model(transform(image).unsqueeze(0))  # image: PIL, {pixels}; output: {out}
```''']
    if tag in WEIGHTS:
        blocks.append(f'''With simsiam_models, which checks what it downloads and falls back to the authors' own server:

```python
import simsiam_models
import timm

model = timm.create_model('{name}', pretrained=True)
model = timm.create_model('{name}', pretrained=True, num_classes=10)  # to fine-tune
```''')
    if not ours:
        blocks.append(f'''With transformers:

```python
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained('{repo}')
model = {auto}.from_pretrained('{repo}')
outputs = model(**processor(image, return_tensors='pt'))
```''')
    if heads:
        lines = [
            'heads.safetensors holds the projector and the predictor (`projector.0.weight`, ..., `predictor.3.bias`),',
            'which pretraining needs and features do not.']
        if tag in WEIGHTS:
            lines += ['', 'To go on training:', '', '```python', 'import simsiam_models', '',
                      f"model = simsiam_models.create_simsiam('{name}', pretrained=True)", '```']
        blocks.append('\n'.join(lines))
    return '## Usage\n\n' + '\n\n'.join(blocks)


def _results(tag: str) -> str:
    own, others = published(tag), same_page(tag)
    if not own:
        return '## Results\n\nNo results are published for these weights.'
    text = (
        '## Published results\n\nThe numbers (percent) are published by the authors named as their source; they were '
        'not measured again for this card.\n\n' + _table(own))
    if others:
        text += (
            '\n\n### Numbers of other weights files on the same page\n\n'
            "The authors' page lists these beside the ones above, but they were measured with the file named in the "
            'first column, not with this one.\n\n' + _table(others))
    return text


def _table(entries: list[dict[str, Any]]) -> str:
    rows = ['| Weights | Benchmark | Result | Protocol | Source | Remark |', '|---|---|---|---|---|---|']
    for entry in entries:
        numbers = ', '.join(f'{metric} {value}' for metric, value in entry['metrics'].items())
        certainty = [f'which weights: {entry["confidence"]}'] if 'confidence' in entry else []
        remark = '; '.join([*certainty, *([entry['warning']] if 'warning' in entry else [])])
        rows.append(
            f'| `{entry["tag"]}` | {BENCHMARKS[entry["benchmark"]][0]} | {numbers} | {entry.get("protocol", "")} | '
            f'[{entry["source"]}]({entry["url"]}) | {remark} |')
    return '\n'.join(rows)
