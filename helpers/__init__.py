"""The code behind the notebooks: one module per notebook and a few shared ones."""
