"""One file for each family of losses: its equation, its terms, a few lines of torch, and a textbook ``reference()``."""
