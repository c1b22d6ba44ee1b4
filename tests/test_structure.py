"""The rules of the house, read off the source of every file: who may import whom, and how long a function may be."""
import ast
from functools import cache
from pathlib import Path

from conftest import ROOT

PACKAGE = 'simsiam_models'
# The floors, from the top; a module imports from its own floor and from those below it.
FLOORS = [
    ['cli', '__main__', 'train'], ['report', 'predict', 'preflight', 'benchmarks', 'training', '__init__'], ['simsiam'],
    ['resnet'], ['weights'], ['pages'], ['runtime']]
BENCHMARKS = {'knn', 'linear', 'svm', 'finetune', 'detection', 'segmentation', 'neighbours'}


def files() -> dict[str, Path]:
    """Dotted name within the package -> file; '' is the package itself, and 'train' the script."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob('*.py')):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return {**found, 'train': ROOT / 'train.py'}


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports, wherever in the file the import stands."""
    names = files()
    found = {}
    for name, path in names.items():
        package = name.split('.') if path.name == '__init__.py' and name else name.split('.')[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            for base, members in imported(node, package):
                for member in members:
                    module = f'{base}.{member}'.strip('.')
                    found[name].add(module if module in names else base)
    return {name: {m for m in modules if m in names and m != name} for name, modules in found.items()}


def imported(node: ast.AST, package: list[str]) -> list[tuple[str, list[str]]]:
    """(module within this package, names taken from it) for an import statement."""
    if isinstance(node, ast.Import):
        own = [a.name.removeprefix(PACKAGE).strip('.') for a in node.names if a.name.split('.')[0] == PACKAGE]
        return [(module, ['']) for module in own]
    if not isinstance(node, ast.ImportFrom):
        return []
    members = [a.name for a in node.names]
    if node.level:
        parts = package[:len(package) - node.level + 1] + (node.module or '').split('.')
        return [('.'.join(filter(None, parts)), members)]
    if node.module and node.module.split('.')[0] == PACKAGE:
        return [(node.module.removeprefix(PACKAGE).strip('.'), members)]
    return []


def floor(module: str) -> int:
    top = module.split('.')[0] or '__init__'
    return next(i for i, names in enumerate(reversed(FLOORS)) if top in names)


def test_the_reader_of_imports_sees_them():
    found = imports()
    assert 'runtime.lifecycle' in found['training.pretrain'] and 'weights.layouts' in found['resnet']
    assert sum(map(len, found.values())) > 200


def test_no_circle_of_imports():
    found, done = imports(), set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, ' -> '.join([*above[above.index(module):], module])
        if module not in done:
            for other in sorted(found[module]):
                visit(other, (*above, module))
            done.add(module)
    for module in found:
        visit(module, ())


def test_imports_run_downwards():
    """data stands beside weights: it knows no model, and the models know no data."""
    wrong = []
    for module, others in imports().items():
        for other in others:
            top, below = module.split('.')[0], other.split('.')[0]
            if top == 'data' or below == 'data':
                allowed = below in ('data', 'runtime') if top == 'data' else floor(module) >= 4
            else:
                allowed = floor(other) <= floor(module) and below != 'train'
            if not allowed:
                wrong.append(f'{module} -> {other}')
    assert not wrong


def test_runtime_imports_nothing_above_it():
    assert not [
        f'{m} -> {o}' for m, others in imports().items() if m.startswith('runtime') for o in others
        if not o.startswith('runtime')]


def test_pages_know_only_what_they_are_given():
    assert not [f'{m} -> {o}' for m, others in imports().items() if m.startswith('pages') for o in others
                if not o.startswith(('pages', 'runtime'))]


def test_weights_import_no_model():
    assert not [f'{m} -> {o}' for m, others in imports().items() if m.startswith('weights') for o in others
                if o in ('resnet', 'simsiam', '')]


def benchmark(module: str) -> str:
    parts = module.split('.')
    return parts[1] if parts[0] == 'benchmarks' and len(parts) > 1 and parts[1] in BENCHMARKS else ''


def test_no_benchmark_imports_another_and_results_import_none():
    wrong = []
    for module, others in imports().items():
        for other in map(benchmark, others):
            if other and benchmark(module) and other != benchmark(module):
                wrong.append(f'{module} -> {other}')
            if other and module.startswith('benchmarks') and not benchmark(module):
                wrong.append(f'{module} -> {other}')
    assert not wrong


def test_only_data_calls_the_kernel():
    assert not [m for m, others in imports().items() if 'data.kernel' in others and not m.startswith('data')]


def functions() -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for path in (*files().values(), ROOT / 'hubconf.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((f'{path.relative_to(ROOT)}:{node.lineno} {node.name}', node))
    return found


def test_a_function_fits_a_screen_and_takes_at_most_six_positional_parameters():
    long = [where for where, f in functions() if f.end_lineno - f.lineno >= 50]
    wide = [where for where, f in functions() if len(
        [a for a in f.args.posonlyargs + f.args.args if a.arg not in ('self', 'cls')]) > 6]
    assert not long and not wide


def test_a_file_is_short_enough_to_be_read_at_once():
    lines = {path.name: path.read_text().count('\n') for path in files().values()}
    assert lines['train.py'] <= 20
    assert not {name: n for name, n in lines.items() if n > 500}


def test_no_private_name_is_used_in_another_module():
    wrong = []
    for module, path in files().items():
        tree = ast.parse(path.read_text())
        modules = set()
        for node in ast.walk(tree):
            package = module.split('.')[:-1]
            for base, members in imported(node, package):
                wrong += [f'{module}: {base}.{name}' for name in members if name.startswith('_') and name[1:2] != '_']
                modules |= {m for m in members if f'{base}.{m}'.strip('.') in files()}
        wrong += [
            f'{module}:{node.lineno} {node.value.id}.{node.attr}' for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
            and node.attr.startswith('_') and node.attr[1:2] != '_']
    assert not wrong


def test_a_catch_all_says_which_library_throws_what():
    bare = []
    for path in files().values():
        lines = path.read_text().split('\n')
        for i, line in enumerate(lines):
            if line.strip().startswith(('except Exception', 'except BaseException', 'except:')):
                if '#' not in line and not lines[i - 1].strip().startswith('#'):
                    bare.append(f'{path.relative_to(ROOT)}:{i + 1}')
    assert not bare


def test_classes_have_names_of_their_own():
    seen: dict[str, str] = {}
    twice = []
    for module, path in files().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                if node.name in seen:
                    twice.append(f'{node.name}: {seen[node.name]}, {module}')
                seen[node.name] = module
    assert not twice
