"""The documentation site: `python3 -m sphinx -W --keep-going -n docs site` builds it, without network."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tables  # noqa: E402

from simsiam_models import __version__  # noqa: E402

project, release, author = 'simsiam_models', __version__, 'The authors of simsiam_models'
copyright = author
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_build', 'images']
html_theme, html_title = 'furo', f'simsiam_models {release}'
html_show_sourcelink = html_copy_source = False

myst_enable_extensions = ['colon_fence', 'substitution']
myst_heading_anchors = 3
myst_substitutions = tables.render_all()

nb_execution_mode, nb_execution_in_temp, nb_execution_raise_on_error = 'force', True, True
nb_execution_timeout = 600
nb_merge_streams = True
nb_execution_show_tb = True

default_role, smartquotes = 'code', False  # docstrings are Markdown
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
# Types of other projects: without network, there are no inventories to link to.
nitpick_ignore_regex = [('py:.*', r'(?!simsiam_models\.).*')]
# Types that these pages do not describe.
nitpick_ignore = [('py:class', f'simsiam_models.{name}') for name in (
    'benchmarks.backbone.Backbone', 'benchmarks.protocols.DetectorNumbers',
    'benchmarks.segmentation.inference.Inference', 'data.readers.images.MemoryImages')]
