"""Config -> what it will need before it runs: parameters, model states per GPU, rows per step."""
