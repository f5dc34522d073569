"""The plugin for verl where verl is not installed. All other tests of the plugin need verl: test_verl.py."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_package_imports_and_the_plugin_names_what_to_install():
    code = (
        "import sys; sys.modules['verl'] = None\n"
        "import reval.integrations.replay\n"
        "try: import reval.integrations.verl\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install verl==0.9.1" in done.stdout
