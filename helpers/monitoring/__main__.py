"""``python -m helpers.monitoring``."""

import sys

from helpers.monitoring import main

sys.exit(main())
