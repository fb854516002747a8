"""``python -m helpers.server``."""

import sys

from helpers.server import main

sys.exit(main())
