"""The code behind the notebooks: one module per notebook and a few shared ones."""

import warnings

# Libraries ask for a progress widget that a batch run has no use for.
warnings.filterwarnings("ignore", message="IProgress not found")
