"""What a release is made of: one version, the sdist and the wheel, CITATION.cff, and the files that GitHub reads."""
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, build_wheel, copy_sources

import simsiam_models

GITHUB = ROOT / '.github'
if not GITHUB.is_dir():
    pytest.skip('needs a clone: the sdist has no .github', allow_module_level=True)
RELEASE = yaml.safe_load((GITHUB / 'workflows' / 'release.yml').read_text())


@pytest.fixture(scope='module')
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An sdist, a wheel from it, and a wheel from a clone, built where importing torch, timm or NumPy fails."""
    folder = tmp_path_factory.mktemp('built')
    (folder / 'broken').mkdir()
    for name in ('torch', 'timm', 'numpy'):
        (folder / 'broken' / f'{name}.py').write_text(f'raise RuntimeError("building imports {name}")\n')
    clone = copy_sources(folder / 'clone')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(folder / 'broken'))
        subprocess.run(
            [sys.executable, '-m', 'build', '--sdist', '--no-isolation', '--outdir', str(folder), str(clone)],
            check=True, timeout=120, stdout=subprocess.DEVNULL)
        sdist = next(folder.glob('*.tar.gz'))
        with tarfile.open(sdist) as archive:
            archive.extractall(folder / 'unpacked', filter='data')
        return {
            'sdist': sdist, 'from clone': build_wheel(folder / 'one', clone),
            'from sdist': build_wheel(folder / 'two', next((folder / 'unpacked').iterdir()))}


def test_the_sdist_holds_what_git_tracks_except_for_the_files_of_github(built):
    with tarfile.open(built['sdist']) as archive:
        names = {member.name.split('/', 1)[1] for member in archive if member.isfile()}
    made = {name for name in names if name.startswith('simsiam_models.egg-info/')} | {'PKG-INFO'}
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert names - made == {name for name in tracked.splitlines() if not name.startswith('.github/')}
    assert {'simsiam_models/data/kernel.c', 'LICENSE', 'CITATION.cff', 'tests/conftest.py'} <= names


def test_a_wheel_from_the_sdist_equals_one_from_a_clone_byte_for_byte(built):
    one, two = (zipfile.ZipFile(built[name]) for name in ('from clone', 'from sdist'))
    assert built['from clone'].name == built['from sdist'].name
    assert {name: one.read(name) for name in one.namelist()} == {name: two.read(name) for name in two.namelist()}


def test_the_package_index_accepts_both(built):
    done = subprocess.run(
        [sys.executable, '-m', 'twine', 'check', '--strict', *map(str, built.values())], capture_output=True, text=True,
        timeout=60)
    assert done.returncode == 0 and done.stdout.count('PASSED') == 3, done.stdout


def test_the_version_stands_in_three_places_that_agree(built):
    version = simsiam_models.__version__
    wheel = zipfile.ZipFile(built['from sdist'])
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith('.dist-info/METADATA'))).decode()
    assert f'\nVersion: {version}\n' in metadata
    assert built['sdist'].name == f'simsiam_models-{version}.tar.gz'
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == version
    assert re.search(r'^## (\S+)$', (ROOT / 'CHANGELOG.md').read_text(), re.M).group(1) == version
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    again = re.compile(rf'(version|release)[\W_]+{re.escape(version)}', re.I)
    named = [name for name in tracked.splitlines() if name.endswith(('.py', '.cff', '.cfg', '.toml', '.yml', '.md'))
             and again.search((ROOT / name).read_text())]
    assert named == ['CITATION.cff', 'simsiam_models/__init__.py'], 'the version belongs nowhere else'


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert (citation['type'], citation['title']) == ('software', 'simsiam_models')
    license = re.search(r'^license_expression = (.*)$', (ROOT / 'setup.cfg').read_text(), re.M).group(1)
    assert citation['license'] == license
    paper = citation['references'][0]
    assert paper['title'] == 'Exploring Simple Siamese Representation Learning' and paper['year'] == 2021
    assert [author['family-names'] for author in paper['authors']] == ['Chen', 'He']
    assert paper['url'].removeprefix('https://arxiv.org/abs/') in (ROOT / 'README.md').read_text()


@pytest.mark.parametrize(('schema', 'pattern'), [
    ('citation-file-format', 'CITATION.cff'), ('github-workflows', '.github/workflows/*.yml'),
    ('github-issue-config', '.github/ISSUE_TEMPLATE/config.yml'),
    ('github-issue-forms', '.github/ISSUE_TEMPLATE/[!c]*.yml')])
def test_the_files_follow_their_schemas(schema: str, pattern: str):
    files = [str(path) for path in ROOT.glob(pattern)]
    done = subprocess.run(
        [sys.executable, '-m', 'check_jsonschema', '--builtin-schema', f'vendor.{schema}', *files], capture_output=True,
        text=True, timeout=60)
    assert files and done.returncode == 0, done.stdout + done.stderr


def test_workflows_may_only_read_and_only_publishing_gets_an_identity():
    for path in (GITHUB / 'workflows').glob('*.yml'):
        workflow = yaml.safe_load(path.read_text())
        assert workflow['permissions'] == {'contents': 'read'}
        granted = {name: job['permissions'] for name, job in workflow['jobs'].items() if 'permissions' in job}
        assert granted == ({'publish': {'id-token': 'write'}} if path.name == 'release.yml' else {})
        for job in workflow['jobs'].values():
            assert 'timeout-minutes' in job
            used = [step['uses'] for step in job['steps'] if 'uses' in step]
            assert all(re.fullmatch(r'[\w-]+/[\w-]+@v\d[\d.]*', action) for action in used), used


def test_nothing_is_published_before_every_other_job_has_passed():
    jobs = RELEASE['jobs']
    assert set(jobs['publish']['needs']) == jobs.keys() - {'publish'}
    assert RELEASE[True] == {'push': {'tags': ['v*']}}  # YAML 1.1 reads `on` as true


@pytest.mark.parametrize(('tag', 'passes'), [(f'v{simsiam_models.__version__}', True), ('v9.9.9', False)])
def test_a_tag_that_is_not_the_version_ends_the_release(built, tmp_path, tag: str, passes: bool):
    check = next(step for step in RELEASE['jobs']['sdist']['steps'] if step.get('name') == 'The tag is the version')
    (tmp_path / 'dist').mkdir()
    (tmp_path / 'dist' / built['sdist'].name).touch()
    done = subprocess.run(
        ['bash', '-c', check['run']], cwd=tmp_path, env={**os.environ, 'GITHUB_REF_NAME': tag}, timeout=10)
    assert (done.returncode == 0) is passes


def test_scripts_that_the_workflows_start_are_executable():
    text = ''.join(path.read_text() for path in (GITHUB / 'workflows').glob('*.yml'))
    scripts = set(re.findall(r'(?<!\S)\.ci/\w+', text))
    assert scripts == {'.ci/run', '.ci/smoke'} and all(os.access(ROOT / script, os.X_OK) for script in scripts)
