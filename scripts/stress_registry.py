#!/usr/bin/env python3
"""Does every request get its own cartridge while hundreds cycle through a small budget? See --help."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from stress.main import main  # noqa: E402

sys.exit(main())
