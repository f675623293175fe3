"""One file a model family, and `interfaces` with what the engine asks of a class."""
