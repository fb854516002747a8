"""``python -m helpers.colab``."""

import sys

from helpers.colab import main

sys.exit(main())
