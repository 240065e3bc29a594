"""Settings: YAML files and command-line overrides -> frozen, checked dataclasses. Imports no torch, so a dry run is instant.

`resolve_fit`, `resolve_generate` and `resolve_measure` give the settings of one cell; fields.py says what each key means;
keys.py lists the other spellings and the released keys that have no effect.
"""

from spilt.settings.copy import main
from spilt.settings.fields import FitSettings, GenerateSettings, GenerationParams, MeasureSettings
from spilt.settings.files import load_yaml
from spilt.settings.keys import IGNORED_KEYS, KEY_ALIASES, SETTINGS, verbs_of
from spilt.settings.resolve import (
    ROOT,
    Resolved,
    expected_hparam_files,
    hparam_file,
    parse_overrides,
    resolve_fit,
    resolve_generate,
    resolve_measure,
)
