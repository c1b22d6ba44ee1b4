"""The README.md of a Hub repository: what the weights are, how to use them, and the numbers published for them."""
import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..runtime.messages import plain_markdown
from .history import History
from .published import BGR_EVIDENCE, MMSELFSUP_0, WEIGHTS, Weights, find_page_results, find_results, format_metrics

# Benchmark in published.json -> title, the Hub's task type, the Hub's id of the data set, and its name.
BENCHMARKS = {
    'imagenet_linear': ('ImageNet linear probe, top-1', 'image-classification', 'imagenet-1k', 'ImageNet-1k'),
    'imagenet_linear_avgpool': ('ImageNet linear probe, top-1', 'image-classification', 'imagenet-1k', 'ImageNet-1k'),
    'imagenet_mhead_linear': ('ImageNet linear probes on five stages, top-1', 'image-classification', 'imagenet-1k',
                              'ImageNet-1k'),
    'imagenet_knn_T0.07': ('ImageNet kNN, top-1', 'image-classification', 'imagenet-1k', 'ImageNet-1k'),
    'places205_mhead_linear': ('Places205 linear probes on five stages, top-1', 'image-classification', 'places205',
                               'Places205'),
    'voc07_svm_feature5': ('VOC2007 SVM', 'image-classification', 'voc2007', 'PASCAL VOC 2007'),
    'voc07_lowshot_svm_feature5': ('VOC2007 low-shot SVM, mAP', 'image-classification', 'voc2007', 'PASCAL VOC 2007'),
    'voc0712_faster_rcnn_c4_24k': ('VOC2007+2012 detection', 'object-detection', 'voc0712', 'PASCAL VOC 2007+2012'),
    'coco_mask_rcnn_r50_fpn_ms_1x': ('COCO detection and instance segmentation', 'object-detection', 'coco',
                                     'COCO 2017'),
    'voc12aug_fcn_r50_d8_512_20k': ('VOC2012 segmentation', 'image-segmentation', 'voc2012', 'PASCAL VOC 2012 + SBD'),
}
CITATION = '''## Citation

```bibtex
@article{chen2020simsiam,
  title   = {Exploring Simple Siamese Representation Learning},
  author  = {Xinlei Chen and Kaiming He},
  journal = {arXiv preprint arXiv:2011.10566},
  year    = {2020}
}
```'''
BGR_NOTE = '''## Trained on BGR pixels, made for RGB pixels

The authors trained these weights on BGR pixels with RGB statistics (the loader of MMSelfSup 0.5 and 0.6). That is
{evidence}. In this repository the input channels of the first layer are reversed (`conv1.weight.flip(1)`), so that they
take RGB images like any other weights, and mean and std in config.json are reversed with them: the outputs are those of
the authors' file for BGR images.

Even so, the published transfer results were measured with the authors' file and RGB pixels. Prefer `{counterpart}`,
unless you need exactly these weights.'''


@dataclass
class CardFacts:
    tag: str  # a key of WEIGHTS; any other tag gets a card without published numbers
    repo: str  # the Hub id
    config: dict[str, Any]  # the content of config.json
    parameters: int  # of model.safetensors
    origin: str  # which file the weights come from, and whether it was verified
    heads: bool  # whether the repository has heads.safetensors
    license: str
    history: History | None = None  # how weights of the uploader's were trained

    @property
    def weights(self) -> Weights | None:
        return WEIGHTS.get(self.tag)

    @property
    def needs_package(self) -> bool:  # timm and transformers alone lack the architecture
        return str(self.config['architecture']).startswith('simsiam_')

    @property
    def name(self) -> str:
        return self.repo.split('/')[-1]


def format_card(facts: CardFacts) -> str:
    """Returns README.md with its front matter."""
    weights, history = facts.weights, facts.history
    metadata = ModelCardData(
        library_name='timm', license=facts.license,
        tags=['timm', *([] if facts.needs_package else ['transformers']), 'simsiam', 'self-supervised'],
        pipeline_tag='image-classification' if facts.config['num_classes'] else 'image-feature-extraction',
        datasets=['imagenet-1k'] if weights else list(history.datasets) or None if history else None,
        base_model=facts.repo.replace(facts.tag, str(weights.counterpart)) if weights and weights.linear else (
            history and history.base_model),
        model_name=facts.name, eval_results=_list_eval_results(facts.tag) + _list_scores(facts) or None)
    note = [BGR_NOTE.format(counterpart=weights.counterpart, evidence=BGR_EVIDENCE[facts.tag])] if (
        weights and weights.bgr) else []
    return '\n\n'.join([
        f'---\n{metadata.to_yaml()}\n---', _format_details(facts), *note, _format_usage(facts),
        _format_scores(history) if history else _format_results(facts.tag), CITATION]) + '\n'


def _list_eval_results(tag: str) -> list[EvalResult]:
    """Returns the published numbers of exactly this file, without those of other files on the same page."""
    results = []
    for entry in find_results(tag):
        title, task, dataset, dataset_name = BENCHMARKS[entry['benchmark']]
        metrics = {k: v for k, v in entry['metrics'].items() if k != 'mIoU_first_report'}  # reported again since
        # dataset_config: the Hub client merges results of one task, data set and config, and keeps one source.
        results += [EvalResult(
            task_type=task, task_name=title, dataset_type=dataset, dataset_name=dataset_name,
            dataset_config=entry['benchmark'], metric_value=value,
            metric_type={'top-1': 'accuracy', 'mAP': 'mAP'}.get(title.split(', ')[-1], metric),
            metric_name=title if metric == 'top1' else f'{title}: {metric}',
            source_name=entry['source'], source_url=entry['url']) for metric, value in metrics.items()]
    return results


def _list_scores(facts: CardFacts) -> list[EvalResult]:
    """Returns what was measured in a training of the uploader's."""
    if facts.history is None:
        return []
    data = facts.history.data
    return [EvalResult(
        task_type='image-classification', task_name='Image classification', dataset_name=data,
        dataset_type=next(iter(facts.history.datasets), None) or re.sub(r'[^\w.-]+', '-', data, flags=re.ASCII),
        dataset_config=score.name, metric_type='accuracy', metric_name=score.name, metric_value=score.value,
    ) for score in facts.history.scores]


def _format_details(facts: CardFacts) -> str:
    config, weights, classes = facts.config, facts.weights, facts.config['num_classes']
    network = 'ResNet-50' if config['architecture'] == 'resnet50' else config['architecture']
    training = f' on ImageNet-1k ({weights.epochs} epochs, batch {weights.batch})' if weights else ''
    fc = f'with a classifier of {classes} classes' if classes else 'without a classifier'
    if weights and classes:
        fc = f'with a linear classifier of {classes} classes on its frozen features'
    summary = plain_markdown(facts.history.summary) if facts.history else f'pretrained by SimSiam{training}'
    rows = [
        ('Model type', f'image {"classifier" if classes else "feature backbone"}, '
                       f'{facts.parameters / 1e6:.1f}M parameters, {config["num_features"]} features'),
        ('Image size', f'{config["pretrained_cfg"]["input_size"][-1]} px'),
        ('Method', 'SimSiam, Exploring Simple Siamese Representation Learning, https://arxiv.org/abs/2011.10566'),
    ]
    if weights:
        rows += [('Pretraining', f'ImageNet-1k without labels, {weights.epochs} epochs, batch {weights.batch}'),
                 ('Published by', f'{weights.publisher}, {weights.project}'), ('Original file', weights.url)]
        if weights.publisher == MMSELFSUP_0:
            rgb = 'RGB (inferred from the dates of the log and of a bug fix)'
            bgr = f'BGR with RGB statistics ({BGR_EVIDENCE.get(facts.tag)}); now RGB, see below'
            rows.append(('Pixels in pretraining', bgr if weights.bgr else rgb))
    if facts.history:
        rows += [(plain_markdown(name), plain_markdown(fact)) for name, fact in facts.history.facts.items()]
    terms = facts.license + (': **no commercial use**' if '-nc' in facts.license else '')
    rows += [('Origin of this file', facts.origin),
             ('License', terms + (', the license of the repository that published them' if weights else ''))]
    details = '\n'.join(f'- **{name}:** {value}' for name, value in rows)
    limit = f'**For non-commercial use only** ({facts.license.upper()}).\n\n' if '-nc' in facts.license else ''
    first = f'A {network} {summary}, {fc}.'
    command = facts.history.command if facts.history else ''
    how = f'\n\n## Training\n\n```bash\n{command}\n```' if command and '`' not in command else ''
    return f'# {facts.name}\n\n{limit}{first}\n\n## Model details\n\n{details}{how}'


def _format_usage(facts: CardFacts) -> str:
    config, repo, name, ours = facts.config, facts.repo, facts.name, facts.needs_package
    out = f'(1, {config["num_classes"]}) logits' if config['num_classes'] else f'(1, {config["num_features"]}) features'
    names = "\nprint(model.pretrained_cfg['label_names'][output.argmax()])" if 'label_names' in config else ''
    auto = 'AutoModelForImageClassification' if config['num_classes'] else 'AutoModel'
    blocks = [f'''{'With timm and simsiam_models' if ours else 'With timm alone'}:

```python
{'import simsiam_models  # registers the architecture' + chr(10) if ours else ''}import timm
import torch
from PIL import Image

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open('photo.jpg').convert('RGB')
with torch.inference_mode():
    output = model(transform(image).unsqueeze(0))  # {out}{names}
```''']
    if facts.weights:
        blocks.append(f'''With simsiam_models, which checks where they come from:

```python
import simsiam_models
import timm

model = timm.create_model('{name}', pretrained=True)
model = timm.create_model('{name}', pretrained=True, num_classes=10)  # to fine-tune
```''')
    if not ours:
        blocks.append(f'''With transformers:

```python
from PIL import Image
from transformers import AutoImageProcessor, {auto}

image = Image.open('photo.jpg').convert('RGB')
processor = AutoImageProcessor.from_pretrained('{repo}')
model = {auto}.from_pretrained('{repo}')
outputs = model(**processor(image, return_tensors='pt'))
```''')
    if facts.heads:
        lines = [
            'heads.safetensors holds the projector and the predictor (`projector.0.weight`, ..., `predictor.3.bias`),',
            'which pretraining needs and feature extraction does not.']
        if facts.weights:
            lines += ['', 'To continue training:', '', '```python', 'import simsiam_models', '',
                      f"model = simsiam_models.create_simsiam('{name}', pretrained=True)", '```']
        blocks.append('\n'.join(lines))
    return '## Usage\n\n' + '\n\n'.join(blocks)


def _format_results(tag: str) -> str:
    own, others = find_results(tag), find_page_results(tag)
    if not own:
        return '## Results\n\nNo results are published for these weights.'
    parts = [
        '## Published results', 'The numbers (percent) are published by the authors named as their source; they were '
        'not measured again for this card.', _format_table(own)]
    if others:
        parts += [
            '### Numbers of other weights files on the same page', "The authors' page lists these next to the ones "
            'above, but they were measured with the file named in the first column, not with this one.',
            _format_table(others)]
    return '\n\n'.join(parts)


def _format_scores(history: History) -> str:
    """Returns the section about what was measured in a training of the uploader's."""
    if not history.scores:
        return '## Results\n\nNothing was measured during training.'
    rows = [f'| {plain_markdown(s.name)} | {s.value:.2f} | {plain_markdown(s.remark)} |' for s in history.scores]
    return '\n'.join([
        '## Results', '', f'Measured during training, on {plain_markdown(history.data)} (percent):', '',
        '| Measure | Result | Remark |', '|---|---|---|', *rows])


def _format_table(entries: list[dict[str, Any]]) -> str:
    rows = ['| Weights | Benchmark | Result | Protocol | Source | Remark |', '|---|---|---|---|---|---|']
    for entry in entries:
        certainty = f'which weights: {entry["confidence"]}' if 'confidence' in entry else None
        remark = '; '.join(filter(None, [certainty, entry.get('warning')]))
        rows.append(
            f'| `{entry["tag"]}` | {BENCHMARKS[entry["benchmark"]][0]} | {format_metrics(entry)} | '
            f'{entry.get("protocol", "")} | [{entry["source"]}]({entry["url"]}) | {remark} |')
    return '\n'.join(rows)
