"""Training, sampling and scoring of generators: the papers' recipes."""
