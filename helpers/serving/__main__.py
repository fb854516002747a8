"""``python -m helpers.serving``."""

import sys

from helpers.serving import main

sys.exit(main())
