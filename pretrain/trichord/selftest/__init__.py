"""What is promised of stopping and going on, tried on this machine: the order of data, and killed and resumed runs."""
