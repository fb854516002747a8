"""What notebooks 02 and 03 train: preprocessing, network, search, and what is logged."""
